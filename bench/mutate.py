"""Mutation test: faults planted in kernels, index and step, which the tests must notice.

``python -m bench.mutate [--only NAME] [--output FILE]`` replaces one piece of text at a time in a copy of the source
tree and runs the tests that concern it, which must fail; they are run on the unchanged copy first, where they must
pass. C++ mutations rebuild the extension, about a minute each. No GPU is needed: the Triton kernels run in
the interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("tal_fast", "kernels", "csrc", "tests", "bench", "setup.py", "pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Mutation:
    """A fault: in ``file`` the text ``old``, which occurs once, becomes ``new``; ``tests`` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


KERNELS = "tests/kernels"
PATHS = (f"{KERNELS}/test_loss.py", "-k", "every_path and (65 or 130) and released")
TIES = (f"{KERNELS}/test_loss.py", "-k", "ties and held")
TURNS = (f"{KERNELS}/test_loss.py", "-k", "shared_among_programs and held")
OPTIONS = (f"{KERNELS}/test_loss.py", "-k", "every_option and reduction and held")
SUMS = (f"{KERNELS}/test_loss.py", "-k", "(test_batch_sums and 33 and float32) or partial_sums")
STATISTICS = (
    f"{KERNELS}/test_distance.py",
    "-k",
    "(any_split and 17 and (65 or 700)) or (float64 and 65) or class_weights",
)
PUSH = (f"{KERNELS}/test_queue_push.py",)
NATIVE = ("tests/loss/test_backends.py", "-k", "native and (golden or confident)")
# The packs of the widest registers are never halved, so other instruction sets are compared too.
PACKS = ("tests/loss/test_extension.py", "tests/loss/test_backends.py", "-k", "instruction_set or (native and golden)")
QUEUE = ("tests/loss/test_queue.py",)
INDEX = ("tests/loss/test_queue_index.py", "-k", "not 140000")
SHARDED = ("tests/loss/test_tensor_parallel.py", "-k", "at_once")
INPLACE = ("tests/loss/test_autograd.py", "-k", "native and (inplace or retained)")
STEP = ("tests/loss/test_module.py", "-k", "one_call")
DIRECT = ("tests/loss/test_module.py", "-k", "native and loss_and_gradient")
WEIGHTS = ("tests/loss/test_weights_and_reductions.py", "-k", "(native and error_bounds) or one_call")
HALF = ("tests/loss/test_module.py", "-k", "loss_and_gradient_of_float16")

MUTATIONS = [
    Mutation(
        "loss: wrong sign of the gradient's component along z", "kernels/rows.py",
        "(constant[:, None] - z_coef[:, None] * z))\n    if WEIGHTED_SMOOTHING",
        "(constant[:, None] + z_coef[:, None] * z))\n    if WEIGHTED_SMOOTHING", PATHS,
    ),
    Mutation(
        "loss: columns past the end of a row count as logits of 0", "kernels/rows.py",
        "keep = (at != (label_at - begin)[:, None]) & ((begin + at) // V * V < length[:, None])",
        "keep = (at != (label_at - begin)[:, None]) & (length[:, None] >= 0)", PATHS,
    ),
    Mutation(
        "loss: the label's exponential left in the sums", "kernels/rows.py",
        "keep = (at != (label_at - begin)[:, None]) & (", "keep = (at >= 0) & (", PATHS,
    ),
    Mutation(
        "loss: both losses with T without the norm", "kernels/loss.py",
        "rate = temperature * inverse_norm", "rate = temperature", PATHS,
    ),
    Mutation(
        "held rows: a turn fetches its own rows again", "kernels/loss.py",
        "        if HELD:\n            ahead = fetch_rows(\n                logits_ptr, distance_ptr, next_row,",
        "        if HELD:\n            ahead = fetch_rows(\n                logits_ptr, distance_ptr, row,", TURNS,
    ),
    Mutation(
        "held rows: ties go to the last class", "kernels/rows.py",
        "(i * WIDTH + at < (column - head)[:, None])", "(i * WIDTH + at > (column - head)[:, None])", TIES,
    ),
    Mutation(
        "wide rows: the label's chunk counts twice", "kernels/loss.py",
        "    begin = (j + (j >= label_chunk).to(tl.int32)) * WIDTH\n                z =",
        "    begin = j * WIDTH\n                z =", PATHS,
    ),
    Mutation(
        "wide rows: the last chunk is left out where it is not full", "kernels/rows.py",
        "tl.where((j == 1) | (label_chunk < full), length, 0)", "tl.where(label_chunk < full, length, 0)", PATHS,
    ),
    Mutation(
        "edges: a logit of the row before belongs to the row", "kernels/rows.py",
        "head = ((V - offset % V) % V).to(tl.int32)", "head = ((V - offset % V) % V).to(tl.int32) - 1", PATHS,
    ),
    Mutation(
        "edges: the last column of a row is left out", "kernels/rows.py",
        "e < head[:, None], column < CLASSES)", "e < head[:, None], column < CLASSES - 1)", PATHS,
    ),
    Mutation(
        "class weights: not in the gradient", "kernels/loss.py",
        "g_p = f_dir * mass * inverse_p", "g_p = f_dir * inverse_p", OPTIONS,
    ),
    Mutation(
        "reduction: a sum is divided as the mean is", "kernels/loss.py",
        '"MEAN": reduction == "mean"', '"MEAN": True', OPTIONS,
    ),
    Mutation(
        "released: the guard counts correct samples instead of accepted ones", "kernels/sums.py",
        "n_accepted += accepted.to(tl.float64)", "n_accepted += correct.to(tl.float64)", SUMS,
    ),
    Mutation(
        "the last program adds only its first partial sums", "kernels/rows.py",
        "    for start in range(0, count, PARTS):", "    for start in range(0, 1, PARTS):", SUMS,
    ),
    Mutation(
        "statistics: biased standard deviation", "kernels/distance.py",
        "/ (width - 1)", "/ width", STATISTICS,
    ),
    Mutation(
        "search: the queue's last entry is left out", "kernels/distance.py",
        "tl.maximum(length - 1, 0)", "tl.maximum(length - 2, 0)", STATISTICS,
    ),
    Mutation(
        "search: a split is left out", "kernels/distance.py",
        "    first = tl.program_id(1) * (UNROLL * ENTRIES)", "    first = (tl.program_id(1) + 1) * (UNROLL * ENTRIES)",
        STATISTICS,
    ),
    Mutation(
        "search: the entries loaded ahead are those at hand", "kernels/distance.py",
        "start + step, length, ENTRIES", "start, length, ENTRIES", STATISTICS,
    ),
    Mutation(
        "summary: the number of valid rows for the sum of their class weights", "kernels/distance.py",
        "tl.sum(weights, axis=0) if HAS_CLASS_WEIGHT else n_valid", "n_valid", STATISTICS,
    ),
    Mutation(
        "push: off by one in the slot", "kernels/queue_push.py",
        "slot = first + rank", "slot = first + rank + 1", PUSH,
    ),
    Mutation(
        "push: of more rows than slots the first slot is not the oldest", "kernels/queue_push.py",
        "first = (head + skipped) % capacity", "first = head", PUSH,
    ),
    Mutation(
        "push: the length grows beyond the capacity", "kernels/queue_push.py",
        "tl.minimum(length + kept, capacity)", "length + kept", PUSH,
    ),
    Mutation(
        "sharded: every rank takes its classes for the first ones", "tal_fast/loss/tensor_parallel.py",
        "label_column = labels - rows.start", "label_column = labels - 0", SHARDED,
    ),
    Mutation(
        "sharded: every rank subtracts the maximum of its own columns", "tal_fast/loss/tensor_parallel.py",
        "exp_sums(z, label_column, rows.largest, scale)", "exp_sums(z, label_column, found[:, LARGEST], scale)",
        SHARDED,
    ),
    Mutation(
        "in place: autograd's version counter is not incremented", "tal_fast/loss/autograd.py",
        "    torch.autograd.graph.increment_version(logits)\n", "", INPLACE,
    ),
    Mutation(
        "backward: the gradient of a retained graph is scaled in place", "tal_fast/loss/autograd.py",
        " and not _graph_is_kept()", "", INPLACE,
    ),
    Mutation(
        "C++ row: wrong sign of the smoothing at the label", "csrc/kernels_cpu.inc",
        "direction_at_label = factor * (-others / sum + smoothing)",
        "direction_at_label = factor * (-others / sum - smoothing)", NATIVE,
    ),
    Mutation(
        "C++ row in place: the label's logit is read after it is overwritten", "csrc/kernels_cpu.inc",
        "magnitude_at_label - z_label * along_z", "magnitude_at_label - z[label] * along_z", INPLACE,
    ),
    Mutation(
        "C++ packs: the second half is loaded from the address of the first", "csrc/pack.inc",
        "return {Half::load(p), Half::load(p + kLanes / 2)};", "return {Half::load(p), Half::load(p)};", PACKS,
    ),
    Mutation(
        "C++ exponential: results that underflow are not set to 0", "csrc/kernels_cpu.inc",
        "        bits &= ~underflow;", "        //", NATIVE,
    ),
    Mutation(
        "C++ step: rejected samples are pushed too", "csrc/step_cpu.cpp",
        "cursor, std::get<2>(out), std::get<3>(out), std::get<9>(out), index);",
        "cursor, std::get<2>(out), std::get<3>(out), std::nullopt, index);", STEP,
    ),
    Mutation(
        "C++ step without a graph: no entry is pushed", "csrc/step_cpu.cpp",
        "class_weight, push, /*need_grad=*/true", "class_weight, false, /*need_grad=*/true", DIRECT,
    ),
    Mutation(
        "loss and gradient: float16 logits get a float16 gradient", "tal_fast/loss/autograd.py",
        "leaf.float() if leaf.dtype == torch.float16 else leaf", "leaf", HALF,
    ),
    Mutation(
        "C++ step: the gradient of a retained graph is scaled in place", "csrc/step_cpu.cpp",
        "const bool kept = torch::autograd::get_current_graph_task_keep_graph();", "const bool kept = false;", STEP,
    ),
    Mutation(
        "C++ class weights: the mean is over the number of rows", "csrc/ops_cpu.cpp",
        "summary[6] = sum_of_weights(y, *class_weight, ignore_index);", "summary[6] = summary[2];", WEIGHTS,
    ),
    Mutation(
        "C++ class weights: label smoothing is subtracted evenly", "csrc/kernels_cpu.inc",
        "gradient[c] -= subtract * shares[c];", "gradient[c] -= subtract / count;", WEIGHTS,
    ),
    Mutation(
        "C++ row losses: an upstream gradient reaches ignored rows", "csrc/step_cpu.cpp",
        "loss = loss.masked_fill(labels == ignore_index, 0);", ";", WEIGHTS,
    ),
    Mutation(
        "sharded class weights: the label's share of the smoothing is added to its weight",
        "tal_fast/loss/tensor_parallel.py",
        "row_scale = (1 - options.label_smoothing) * row_scale + spread", "row_scale = row_scale + spread", SHARDED,
    ),
    Mutation(
        "C++ push: the ring wraps one slot early", "csrc/ring.h",
        "state[0] = state[0] + 1 == capacity ? 0 : state[0] + 1;",
        "state[0] = state[0] + 2 >= capacity ? 0 : state[0] + 1;",
        QUEUE,
    ),
    Mutation(
        "C++ index: the ring wraps one slot early", "csrc/index.h",
        "slot < 0 ? slot + capacity_ : slot", "slot < 0 ? slot + capacity_ - 1 : slot", INDEX,
    ),
    Mutation(
        "C++ index: the oldest entry of a chain is skipped", "csrc/index.h",
        "(next <= span_)", "(next < span_)", INDEX,
    ),
    Mutation(
        "C++ index: the search stops at the query's strip", "csrc/grid.h",
        "const int last = interval(strip_knots_, high.mean);", "const int last = interval(strip_knots_, center.mean);",
        INDEX,
    ),
    Mutation(
        "C++ index: entries with equal means count as equal", "csrc/index.h",
        " && entry(age).point.std == p.std;", ";", INDEX,
    ),
    Mutation(
        "C++ index: generations that do not contain the query are left out", "csrc/index.h",
        "for (const bool inside : {true, false})", "for (const bool inside : {true})", INDEX,
    ),
]  # fmt: skip


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[bool, float]:
    """Whether the tests pass in the copy, and seconds taken; collecting no test is an error."""
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *tests]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(
            f"pytest {' '.join(tests)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return done.returncode == 0, time.perf_counter() - start


def build(folder: Path) -> None:
    """Build the copy's extension."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the extension does not build:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def copy_tree(folder: Path) -> None:
    """Copy the source tree to a folder, with the kernels where an installed package has them."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    kernels = folder / "tal_fast" / "kernels"
    if not kernels.is_symlink():
        kernels.symlink_to("../kernels")  # as an installed package has it


def try_mutation(folder: Path, mutation: Mutation) -> dict[str, object]:
    """Apply one mutation to the copy, run its tests, and restore the file."""
    path = folder / mutation.file
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        raise SystemExit(
            f"{mutation.name}: its text occurs {whole.count(mutation.old)} times in {mutation.file}, not once"
        )
    path.write_text(whole.replace(mutation.old, mutation.new))
    try:
        if mutation.file.startswith("csrc/"):
            build(folder)
        passed, seconds = run_tests(folder, mutation.tests)
    finally:
        path.write_text(whole)
    result = "SURVIVED" if passed else "caught"
    print(f"{result:9} {seconds:6.1f} s  {mutation.name}", flush=True)
    return {
        "mutation": mutation.name, "file": mutation.file, "old": mutation.old, "new": mutation.new,
        "tests": " ".join(mutation.tests), "caught": not passed,
    }  # fmt: skip


def main() -> None:
    """Run the mutations; exit 1 if one survives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="try only mutations whose name contains this text")
    parser.add_argument("--no-build", action="store_true", help="leave out mutations of C++ sources")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    args = parser.parse_args()
    chosen = [
        m for m in MUTATIONS if args.only in m.name and not (args.no_build and m.file.startswith("csrc/"))
    ]  # fmt: skip
    if not chosen:
        parser.error(f"no mutation's name contains {args.only!r}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_tree(folder)
        for tests in dict.fromkeys(mutation.tests for mutation in chosen):  # before any mutated build
            passed, seconds = run_tests(folder, tests)
            print(f"{'passes' if passed else 'FAILS':9} {seconds:6.1f} s  {' '.join(tests)}", flush=True)
            if not passed:
                raise SystemExit("these tests fail without a mutation; mend them first")
        for mutation in chosen:
            results.append(try_mutation(folder, mutation))
            if args.output:
                record = {"commit": commit.stdout.strip(), "results": results}
                args.output.write_text(json.dumps(record, indent=1) + "\n")
    survived = sum(not r["caught"] for r in results)
    print(f"{len(results)} mutations, {survived} survived")
    raise SystemExit(1 if survived else 0)


if __name__ == "__main__":
    main()
