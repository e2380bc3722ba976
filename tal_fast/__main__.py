"""Console command: ``tal-fast train ...`` is ``python -m tal_fast.train ...``."""

import runpy
import sys

COMMANDS = {
    "train": "train a classifier", "predict": "classify image files, and abstain where the model is not confident",
    "evaluate": "report how well confidence tells correct predictions from wrong ones",
    "compare": "compare evaluated runs", "export": "write a run with its threshold as an ONNX or torch.export graph",
    "calibrate": "choose a confidence threshold whose error rate is bounded",
    "experiment": "train, evaluate and compare methods over grids and seeds, from one file",
    "check-data": "check that every image of a folder decodes", "pack": "make WebDataset shards of a folder",
    "html-report": "write report.html of an evaluated run", "info": "show versions, devices and available backends",
}  # fmt: skip


def main() -> None:
    name = sys.argv[1].replace("_", "-") if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv[:2] = [f"tal-fast {name}"]
        runpy.run_module(f"tal_fast.{name.replace('-', '_')}", run_name="__main__")
    elif name in ("-h", "--help"):
        print("usage: tal-fast COMMAND [options]\n", *(f"  {c:<12} {text}" for c, text in COMMANDS.items()), sep="\n")
    else:
        print(f"error: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
