"""Bit-for-bit comparison of training and evaluation by two checkouts: ``python -m bench.same_bits --old CHECKOUT``.

Both checkouts train every method anew for two epochs and go on with the interrupted runs of version 0.1.0 that lie in
tests/data, then evaluate. Compared are all tensors and numbers of the final checkpoints, metrics.csv but for its
timings, and the metrics of report.json. Only the command line is used, with the options as 0.1.0 spells them. Both run
on the CPU with one thread and the C++ extension, which is built where a checkout has none or an outdated one.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
INTERRUPTED = ROOT / "tests" / "data" / "v0.1.0" / "mid-epoch"

SMALL = (
    "--config digits-ce --data.loader torch --data.workers 0 --data.image-size 8 --data.train-limit 300 "
    "--model.width 8 --epochs 2 --batch-size 32 --seed 1 --optim.lr 0.05"
)
TAL = "--method.queue-size 150 --method.t-min 5 --method.t-max 80 --method.confidence-threshold 0 --method.backend"
"""Options of TAL; the threshold is what 0.1.0 and 0.2.0 have by default in both variants."""

METHODS = {
    "ce": "--method.name ce --method.label-smoothing 0.1",
    "tal-paper": f"--method.name tal --method.variant paper --method.warmup-epochs 1 {TAL} native",
    "tal-released": f"--method.name tal --method.variant released --method.t-wrong null {TAL} native",
    "tal-reference": f"--method.name tal {TAL} reference --method.confidence-threshold 0.2",
    "tal-bfloat16": f"--method.name tal --precision bfloat16 --method.queue-scope global {TAL} auto",
    "logitnorm": "--method.name logitnorm --method.options.tau 0.1",
    "crl": "--method.name crl --method.options.weight 0.5",
    "openmix": "--method.name openmix --method.options.outliers patches:64",
    "fmfp": "--method.name fmfp --method.options.swa-from 0.5",
    "fmfp-tal": f"--method.name fmfp-tal --method.options.rho 0.1 --method.options.swa-from 0.5 {TAL} native",
}
"""Fresh runs: case -> options beside ``SMALL``."""
EVERYWHERE = "--device cpu --threads 1 --logger none --progress none"
EVALUATION = "--device cpu --no-typicalness --scores all --ood noise=gaussian:99 --shift dim=contrast:3 --bootstrap 20"

RESUMED = "resumed-"  # prefix of the cases that go on with an interrupted run
NOT_COMPARED = {"images_per_s", "seconds", "data_wait", "accepted", "sums"}
"""Timings; the column that 0.2.0 lacks, and the sums it comes from, whose means are all in metrics.csv."""

COMPARED = ("epoch", "step", "model", "average", "optimizer", "scaler", "ranks", "best", "history")
"""Parts of a checkpoint that must be the same; its configuration may be arranged otherwise."""
MISSING, METRICS = "missing", "evaluation metrics"
REPORTED = ("id_accuracy", "settings", "calibration", "intervals", "differences", "aurc_floor", "aurc_random")


class Code:
    """A copy of a checkout's package, ready to run in a folder of its own.

    Args:
        checkout: working tree, which is only read.
        folder: where to copy the package and run it; must not exist.
    """

    def __init__(self, checkout: Path, folder: Path) -> None:
        source, self.folder = folder / "source", folder / "work"
        words = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=10"]
        self.commit = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        skipped = shutil.ignore_patterns(".*", "build", "dist", "runs", "data", "docs", "tests", "bench", "__pycache__")
        # Only the top folder holds what is skipped: tal_fast has a data package too.
        shutil.copytree(checkout, source, ignore=lambda d, names: skipped(d, names) if Path(d) == checkout else set())
        self.folder.mkdir()
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(source),
            "OMP_NUM_THREADS": "1",
            "TAL_FAST_CACHE": str(folder / "cache"),
        }
        link = source / "tal_fast" / "kernels"
        if not link.exists():
            link.symlink_to("../kernels")
        built = [path.stat().st_mtime for path in (source / "tal_fast").rglob("_C.*")]
        if max(built, default=0.0) < max(path.stat().st_mtime for path in (source / "csrc").iterdir()):
            self.run(["setup.py", "build_ext", "--inplace"], source)
        found = Path(self.run(["-c", "import tal_fast; print(tal_fast.__file__)"]).strip())
        if found.parents[1] != source:
            raise RuntimeError(f"{sys.executable} imports {found} instead of {source / 'tal_fast'}")
        if "C++ extension: yes" not in self.run(["-m", "tal_fast.info"]):
            raise RuntimeError(f"the C++ extension of {checkout} cannot be loaded; see python -m tal_fast.info there")

    def run(self, arguments: Sequence[str], folder: Path | None = None) -> str:
        """Standard output of Python with these arguments; RuntimeError with its last words if it fails."""
        words = [sys.executable, *arguments]
        done = subprocess.run(words, cwd=folder or self.folder, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(arguments[:2])} failed: {(done.stderr.strip() or done.stdout)[-500:]}")
        return done.stdout

    def train_and_evaluate(self, case: str) -> Path:
        """Folder of the finished run of a case."""
        if case in METHODS:
            options = [*SMALL.split(), *METHODS[case].split()]
        else:
            shutil.copytree(INTERRUPTED / case.removeprefix(RESUMED), self.folder / case)
            options = ["--config", f"{case}/config.yaml", "--resume", "auto"]
        self.run(["-m", "tal_fast.train", *options, *EVERYWHERE.split(), "--output", case])
        self.run(["-m", "tal_fast.evaluate", "--run", case, *EVALUATION.split()])
        return self.folder / case


def leaves(value: Any, name: str = "") -> dict[str, Any]:
    """Place -> tensor or plain value, of nested dicts, lists and tuples; without what is not compared."""
    if isinstance(value, dict):
        items: Any = ((key, item) for key, item in value.items() if key not in NOT_COMPARED)
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    return {place: leaf for key, item in items for place, leaf in leaves(item, f"{name}/{key}").items()}


def outcome(run: Path) -> dict[str, dict[str, Any]]:
    """Kind -> place -> value, of all that two runs are compared by."""
    content = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    found = leaves({part: content.get(part) for part in COMPARED})
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    report = json.loads((run / "report.json").read_text())
    return {
        "tensors": {name: value for name, value in found.items() if isinstance(value, torch.Tensor)},
        "numbers": {name: value for name, value in found.items() if not isinstance(value, torch.Tensor)},
        "cells of metrics.csv": leaves(rows),
        METRICS: leaves({part: report.get(part) for part in REPORTED}),
    }


def same(one: Any, other: Any) -> bool:
    """Whether two leaves have the same type, shape and bits."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        bits = [value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for value in (one, other)]
        return one.dtype == other.dtype and one.shape == other.shape and bits[0] == bits[1]
    return type(one) is type(other) and repr(one) == repr(other)


def compare(case: str, codes: Sequence[Code], tolerance: float = 0.0) -> dict[str, Any]:
    """Run a case with both codes: ``counts`` of what was compared, the ``differing`` places beyond the tolerance of
    evaluation metrics, and the ``largest`` difference of one.
    """
    result: dict[str, Any] = {"case": case, "counts": {}, "differing": [], "largest": 0.0}
    try:
        with ThreadPoolExecutor() as pool:
            old, new = map(outcome, pool.map(lambda code: code.train_and_evaluate(case), codes))
    except RuntimeError as problem:
        return {**result, "differing": [str(problem)]}
    for kind, values in old.items():
        places = {**values, **new[kind]}
        result["counts"][kind] = len(places)
        for place in places:
            one, other = values.get(place, MISSING), new[kind].get(place, MISSING)
            difference = 0.0 if same(one, other) else math.inf
            if difference and kind == METRICS and isinstance(one, float) and isinstance(other, float):
                difference = abs(one - other)
                result["largest"] = max(result["largest"], difference)
            if not difference <= tolerance:
                result["differing"].append(f"{kind}: {place}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 if all is the same, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.same_bits", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--old", type=Path, required=True, metavar="CHECKOUT", help="working tree of the older commit")
    parser.add_argument("--new", type=Path, default=ROOT, metavar="CHECKOUT", help="of the newer one (this checkout)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result as JSON")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of evaluation metrics alone (%(default)s)")
    args = parser.parse_args(argv)
    checkouts = [args.old.resolve(), args.new.resolve()]
    cases = [*METHODS, *sorted(f"{RESUMED}{path.name}" for path in INTERRUPTED.iterdir())]
    with tempfile.TemporaryDirectory() as folder:
        codes = [Code(path, Path(folder) / name) for path, name in zip(checkouts, ("old", "new"), strict=True)]
        results = []
        for case in cases:
            results.append(compare(case, codes, args.tolerance))
            counts, places = results[-1]["counts"], results[-1]["differing"]
            verdict = f"DIFFERENT ({len(places)}), such as {places[0]}; compared" if places else "same:"
            compared = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            print(f"{case:<16} {verdict} {compared} (largest difference {results[-1]['largest']:.2g})", flush=True)
    if args.out is not None:
        about = {"old": codes[0].commit, "new": codes[1].commit, "tolerance": args.tolerance}
        about |= {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
        args.out.write_text(json.dumps({**about, "cases": results}, indent=1) + "\n")
    return int(any(found["differing"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
