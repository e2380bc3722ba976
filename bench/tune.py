"""Launch options of the kernels on this GPU: ``python -m bench.tune``.

At each size it tries the built-in rules and candidates, all compiled in parallel first. Each must give the loss and
gradient, or the distances, of the reference; the fastest is kept where it beats the built-in rules by ``GAIN``. The
choices go to ``kernels/tuned/``, a file per architecture, which the launchers read; sizes that no time is left for keep
theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from bench import bench_loss, bench_typicalness, gpu
from bench.compile_ahead import Job, compile_all
from tal_fast.kernels import launch, layout

GAIN = 0.03
"""Least gain over the built-in rules that an entry of the file must bring: about the spread of repeated timings."""

LOSS_SHAPES = [
    (65_536, 100),
    (32_768, 512),
    (16_384, 1000),
    (8192, 4096),
    (4096, 8192),
    (4096, 21_841),
    (1024, 131_072),
]
SEARCHES = [(256, 20_000), (256, 880_880), (1024, 880_880)]  # B, N
WIDTH = 64  # features of a row in the searches, which the search does not depend on

BUILT_IN = "built-in rules"
Options = dict[str, int]


class Trial(NamedTuple):
    """A kernel at one size: what to try and how.

    Attributes:
        kernel: its name in the file.
        size: what the file's entries are chosen by: the number of classes, or of pairs.
        label: the size in words.
        candidates: options to try.
        prepare: gives the function that checks and times the kernel with the options in force, in milliseconds.
        compile: makes the kernel's launch, to be compiled only.
    """

    kernel: str
    size: int
    label: str
    candidates: list[Options]
    prepare: Callable[[], Callable[[], float]]
    compile: Job


def loss_candidates(classes: int) -> list[Options]:
    """Options of the loss kernel: for rows on chip logits and registers a thread; for others the programs and loads."""
    if classes <= layout.WIDEST_HELD:
        # With fewer registers these spill (32 logits below 168, 16 below 125), and 64 logits spill with all.
        pairs = [(8, 96), (8, 128), (16, 128), (16, 168), (32, 168), (32, 200), (32, 255)]
        return [{"logits": logits, "max_registers": registers} for logits, registers in pairs]
    shapes = [(4, 4), (4, 3), (4, 2), (8, 2), (8, 1), (16, 1)]
    return [
        {"num_warps": 16, "programs": 2, "unroll": 1, "max_registers": 64},
        *(
            {"num_warps": w, "programs": p, "unroll": u, "max_registers": 128}
            for (w, p), u in product(shapes, (1, 2, 4))
        ),
    ]


def search_candidates() -> list[Options]:
    """Options of the search: rows and entries of a tile, warps and programs, entries of a thread in flight."""
    return [
        {"queries": q, "entries": 32 * w, "num_warps": w, "programs": p, "unroll": u}
        for q, (w, p), u in product((8, 16, 32), ((2, 16), (4, 8), (2, 8)), (2, 4, 8))
    ]


def loss_trial(bench: gpu.Bench, rows: int, classes: int, dtype: torch.dtype) -> Trial:
    """The loss kernel of ``paper``; ``released`` has the same layout."""

    def prepare() -> Callable[[], float]:
        p = bench_loss.Problem(rows, classes, dtype, bench.device)
        run = gpu.backend_alone("kernel", p)
        leaves = [p.logits.clone() for _ in range(bench.sets(p.logits.nbytes))]

        def measure() -> float:
            bench_loss.gate("the loss", run, p, "paper")
            return bench.time([partial(run, leaf) for leaf in leaves])["p20_ms"]

        return measure

    kernel, label = f"loss_{8 * dtype.itemsize}bit", f"{rows:,} x {classes:,}"
    job = partial(launch_loss, rows, classes, dtype, bench.device)
    return Trial(kernel, classes, label, loss_candidates(classes), prepare, job)


def launch_loss(rows: int, classes: int, dtype: torch.dtype, device: torch.device) -> None:
    """Loss of logits with any values."""
    logits, labels = (
        torch.empty(rows, classes, dtype=dtype, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )
    p: Any = SimpleNamespace(logits=logits, labels=labels, distance=torch.zeros(rows, device=device), device=device)
    gpu.backend_alone("kernel", p)(logits)


def search_trial(bench: gpu.Bench, rows: int, entries: int) -> Trial:
    """Statistics and search."""

    def prepare() -> Callable[[], float]:
        p = bench_typicalness.Problem(rows, WIDTH, entries, torch.float32, bench.device)
        run = gpu.search_alone(p)

        def measure() -> float:
            bench_typicalness.gate("the search", run(p.features), p)
            return bench.time([partial(run, p.features)] * 4)["p20_ms"]

        return measure

    job = partial(launch_search, rows, entries, bench.device)
    return Trial("search", rows * entries, f"{rows:,} x {entries:,}", search_candidates(), prepare, job)


def launch_search(rows: int, entries: int, device: torch.device) -> None:
    """Search for rows among any entries."""
    p = bench_typicalness.Problem.__new__(bench_typicalness.Problem)  # without the expected distances
    p.features = torch.zeros(rows, WIDTH, device=device)
    p.labels = torch.zeros(rows, dtype=torch.int64, device=device)
    p.queue = bench_typicalness.FeatureQueue(entries, device=device)
    gpu.search_alone(p)(p.features)


@contextmanager
def in_force(kernel: str, options: Options) -> Iterator[None]:
    """Context manager in which a kernel has these options at every size; ``{}`` are the built-in rules."""

    launch.forget_plans()
    try:
        with patch.object(launch, "tuned", lambda architecture: {kernel: [{"at_most": 1 << 62, **options}]}):
            yield
    finally:
        launch.forget_plans()


def launch_with(kernel: str, options: Options, job: Job) -> None:
    """The job with the options in force."""
    with in_force(kernel, options):
        job()


def try_all(trial: Trial, end: float, device: torch.device) -> list[tuple[Options, float | str]]:
    """Options and their milliseconds, or their error, until ``end``; the built-in rules, ``{}``, come first."""
    measure = trial.prepare()
    found: list[tuple[Options, float | str]] = []
    for options in ({}, *trial.candidates):
        if time.monotonic() > end:
            break
        try:
            with in_force(trial.kernel, options):
                found.append((options, measure()))
        except Exception as error:
            found.append((options, gpu.first_line(error)))
            if gpu.context_is_lost(device):
                raise
    return found


def chosen(found: list[tuple[Options, float | str]]) -> Options:
    """Fastest options, or ``{}`` unless they beat the built-in rules by ``GAIN``."""
    timed = [(t, i) for i, (_, t) in enumerate(found) if isinstance(t, float)]
    if not timed:
        return {}
    best, i = min(timed)
    built_in = found[0][1]
    return {} if isinstance(built_in, float) and best > (1 - GAIN) * built_in else found[i][0]


def entries_of(choices: dict[int, Options]) -> list[Options]:
    """A kernel's part of the file, from options by size.

    The first entry of at least a size serves it; one without options leaves it to the built-in rules, which also serve
    what is beyond the last. Neighbours of equal options are one.
    """
    found: list[Options] = []
    for size, options in sorted(choices.items()):
        entry = {**options, "at_most": size}
        if found and found[-1] | {"at_most": size} == entry:
            found.pop()
        found.append(entry)
    while found and len(found[-1]) == 1:
        found.pop()
    return found


def written(tuned: dict[str, list[Options]]) -> str:
    """The file's text, an entry a line."""
    kernels = [
        f' "{kernel}": [\n' + ",\n".join(f"  {json.dumps(entry)}" for entry in found) + "\n ]"
        for kernel, found in sorted(tuned.items())
        if found
    ]
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200, help="try nothing more after this long (200)")
    parser.add_argument("--only", default="loss,search", help="kernels, by commas (loss,search)")
    parser.add_argument("--out", type=Path, help="file to write (kernels/tuned/sm_NN.json)")
    args = parser.parse_args(argv)
    end = time.monotonic() + args.seconds
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU is here, and only there a time means anything")
    if not set(args.only.split(",")) <= {"loss", "search"}:
        parser.error(f"--only is {args.only!r}; name loss, search or both, separated by a comma")
    architecture = launch.device_target(torch.device("cuda")).architecture
    file = Path(launch.__file__).parent / "tuned" / f"{architecture}.json"
    tuned: dict[str, list[Options]] = json.loads(file.read_text()) if file.exists() else {}
    choices = {kernel: {entry.pop("at_most"): entry for entry in found} for kernel, found in tuned.items()}
    bench = gpu.Bench(smoke=False)
    trials = [search_trial(bench, *each) for each in SEARCHES] if "search" in args.only else []
    for dtype in (torch.bfloat16, torch.float32):
        trials += [loss_trial(bench, *each, dtype) for each in LOSS_SHAPES] if "loss" in args.only else []
    jobs = [partial(launch_with, t.kernel, options, t.compile) for t in trials for options in ({}, *t.candidates)]
    compile_all(jobs)
    print(f"{len(jobs)} candidates compiled, {end - time.monotonic():.0f} s left", flush=True)
    out = args.out or file
    for trial in trials:
        if time.monotonic() > end:
            print(f"{trial.kernel} {trial.label}: no time left")
            continue
        found = try_all(trial, end, bench.device)
        best = chosen(found)
        choices.setdefault(trial.kernel, {})[trial.size] = best
        print(f"{trial.kernel} {trial.label}: {best or BUILT_IN}")
        for options, t in found:
            print(f"  {f'{1e3 * t:.1f} us' if isinstance(t, float) else t}  {options or BUILT_IN}", flush=True)
        out.parent.mkdir(exist_ok=True)
        out.write_text(written({kernel: entries_of(each) for kernel, each in choices.items()}))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
