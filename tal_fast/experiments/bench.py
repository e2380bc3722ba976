"""Expected hours of an experiment on this machine, from a few steps of each of its rows."""

from __future__ import annotations

import gc

import torch

from tal_fast.evaluation.tables import wrap
from tal_fast.experiments.plan import Experiment
from tal_fast.training.throughput import expected_of
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import environment
from tal_fast.utils.process import sentence


def print_expected_hours(experiment: Experiment, at_once: int) -> int:
    """Measure each row of the tables, one after another, and print what all runs will take.

    Args:
        experiment: whose runs are measured with its first seed.
        at_once: number of runs at the same time, for the last line.

    Returns:
        0, or 1 if a row cannot be measured, which is named with its reason.
    """
    torch.set_num_threads(experiment.threads)
    found = environment()
    device = found["gpu"] or f"{found['cpu']}, {experiment.threads} thread{'s' * (experiment.threads > 1)} a run"
    print(wrap(f"{device}; Python {found['python']}, torch {found['torch']}, commit {found['commit']}"), flush=True)
    first = [job for job in experiment.jobs if job.seed == experiment.seeds[0]]
    width, runs = max(len(job.label) for job in first), len(experiment.seeds)
    print(f"{'run':{width}}   ms/step   images/s  data wait  hours each   runs    hours")
    total, failed = 0.0, 0
    notes: dict[str, list[str]] = {}
    for job in first:
        try:
            row = expected_of(job.config, Ranks.start(job.config.device))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            failed += 1
            print(f"{job.label:{width}}  not measured: {sentence(error)}", flush=True)
            continue
        finally:
            gc.collect()  # the trainer, whose GPU memory the next one needs
            torch.cuda.empty_cache()
            torch.compiler.reset()  # after 8 networks of one class no more are compiled
        total += row.hours * runs
        if row.note:
            notes[row.note] = [*notes.get(row.note, []), job.label]
        print(
            f"{job.label:{width}} {1e3 * job.config.batch_size / row.images_per_s:9.2f} {row.images_per_s:10.0f} "
            f"{row.data_wait:10.0%} {_hours(row.hours):>11} {runs:6} {_hours(runs * row.hours):>8}",
            flush=True,
        )
    for note, labels in notes.items():
        print(wrap(f"{', '.join(labels)}: {note}"))
    together = f", {_hours(total / at_once)} with {at_once} at once" if at_once > 1 else ""
    print(f"{_hours(total)} hours for {runs * (len(first) - failed)} runs{together}")
    print("Training and its validations, without start-up and the evaluation after it.")
    return 1 if failed else 0


def _hours(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
