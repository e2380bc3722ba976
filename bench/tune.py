"""Launch options of the kernels on this GPU: ``python -m bench.tune``.

At each size it tries the built-in rules and the options that ``candidates`` of a kernel's module lists, all compiled in
parallel first. Each must give the loss and gradient, or the distances, of the reference; the fastest is kept where it
beats the built-in rules by ``GAIN``. The choices go to ``kernels/tuned/``, a file per architecture, which the launchers
read; sizes that no time is left for keep theirs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import bench_loss, bench_typicalness, gpu
from bench.compile_ahead import compile_all, step_job
from tal_fast.kernels import distance, launch, loss

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

BUILT_IN = "built-in rules"
Options = dict[str, Any]


class Trial(NamedTuple):
    """A kernel at one size: what to try and how.

    Attributes:
        kernel: its name in the file.
        size: what the file's entries are chosen by, the number of classes or of pairs.
        label: the size in words.
        candidates: options to try.
        prepare: gives the function that checks and times the kernel with the options in force, in milliseconds.
        step: B, C, D, N and the type of the logits of a step that compiles the same kernels.
    """

    kernel: str
    size: int
    label: str
    candidates: list[Options]
    prepare: Callable[[], Callable[[], float]]
    step: tuple[tuple[int, int, int, int], torch.dtype]


def loss_trial(bench: gpu.Bench, rows: int, classes: int, dtype: torch.dtype) -> Trial:
    """The loss kernels of both variants, whose times are added."""

    def prepare() -> Callable[[], float]:
        p = bench_loss.Problem(rows, classes, dtype, bench.device)
        leaves = [p.logits.clone() for _ in range(bench.sets(p.logits.nbytes))]

        def measure() -> float:
            total = 0.0
            for name, variant in (("kernel", "paper"), ("kernel_released", "released")):
                run = gpu.backend_alone(name, p)
                bench_loss.gate(name, run, p, variant)
                total += bench.time([partial(run, leaf) for leaf in leaves])["p20_ms"]
            return total

        return measure

    kernel = f"loss_{8 * dtype.itemsize}bit"
    candidates = loss.candidates(classes, dtype)
    label = f"{rows:,} x {classes:,}"
    return Trial(kernel, classes, label, candidates, prepare, ((rows, classes, 16, 16), dtype))


def search_trial(bench: gpu.Bench, rows: int, entries: int, width: int = 64) -> Trial:
    """Statistics and search."""

    def prepare() -> Callable[[], float]:
        p = bench_typicalness.Problem(rows, width, entries, torch.float32, bench.device)
        run = gpu.search_alone(p)

        def measure() -> float:
            bench_typicalness.gate("the search", run(p.features), p)
            return bench.time([partial(run, p.features)] * 4)["p20_ms"]

        return measure

    candidates, label = distance.candidates(rows, entries), f"{rows:,} x {entries:,}"
    return Trial("search", rows * entries, label, candidates, prepare, ((rows, 16, width, entries), torch.float32))


def compile_job(kernel: str, options: Options, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """A step's kernels with the options of one of them."""
    with launch.override(kernel, options):
        step_job("released", sizes, dtype, torch.float32, "cuda")


def try_all(trial: Trial, end: float, device: torch.device) -> list[tuple[Options, float | str]]:
    """Options and their milliseconds, or their error, until ``end``; the built-in rules, ``{}``, come first."""
    measure = trial.prepare()
    found: list[tuple[Options, float | str]] = []
    for options in ({}, *trial.candidates):
        if time.monotonic() > end:
            break
        try:
            with launch.override(trial.kernel, options):
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


def entries(choices: dict[int, Options]) -> list[Options]:
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
    out = args.out or Path(launch.__file__).parent / "tuned" / f"{launch.architecture(torch.device('cuda'))}.json"
    tuned: dict[str, list[Options]] = json.loads(out.read_text()) if out.exists() else {}
    bench = gpu.Bench(smoke=False)
    trials = [search_trial(bench, *each) for each in SEARCHES] if "search" in args.only else []
    for dtype in (torch.bfloat16, torch.float32):
        trials += [loss_trial(bench, *each, dtype) for each in LOSS_SHAPES] if "loss" in args.only else []
    jobs = [partial(compile_job, t.kernel, options, *t.step) for t in trials for options in ({}, *t.candidates)]
    compile_all(jobs)
    print(f"{len(jobs)} candidates compiled, {end - time.monotonic():.0f} s left", flush=True)
    choices = {kernel: {e["at_most"]: e for e in found} for kernel, found in tuned.items()}
    for trial in trials:
        if time.monotonic() > end:
            print(f"{trial.kernel} {trial.label}: no time left")
            continue
        found = try_all(trial, end, bench.device)
        best = chosen(found)
        choices.setdefault(trial.kernel, {})[trial.size] = best
        print(f"{trial.kernel} {trial.label}: {best or BUILT_IN}")
        for options, t in found:
            time_or_error = f"{1e3 * t:9.1f} us" if isinstance(t, float) else t
            print(f"  {time_or_error}  {options or BUILT_IN}", flush=True)
        tuned[trial.kernel] = entries(choices[trial.kernel])
        out.parent.mkdir(exist_ok=True)
        out.write_text(written(tuned))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
