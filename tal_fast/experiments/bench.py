"""Expected hours of an experiment on this machine, from a few steps of each of its rows."""

from __future__ import annotations

import gc

import torch

from tal_fast.evaluation.tables import wrap
from tal_fast.experiments.plan import Experiment
from tal_fast.experiments.table import machines
from tal_fast.training.throughput import expected_of
from tal_fast.utils.distributed import Ranks
from tal_fast.utils.environment import environment
from tal_fast.utils.logs import duration
from tal_fast.utils.process import sentence


def print_expected_hours(experiment: Experiment, at_once: int) -> int:
    """Measure a run of each row, one after another, and print how long all runs will take, ``at_once`` at a time.

    Returns 0, or 1 if a row cannot be measured, which is named with its reason.
    """
    torch.set_num_threads(experiment.threads)
    print(wrap(*machines([environment()])), flush=True)
    first = [job for job in experiment.jobs if job.seed == experiment.seeds[0]]
    width, runs, seconds = max(len(job.label) for job in first), len(experiment.seeds), []
    print(f"{'run':{width}}    ms/step   images/s  data wait           each   runs   one after another")
    notes: dict[str, list[str]] = {}
    for job in first:
        try:
            row = expected_of(job.config, Ranks.start(job.config.device))
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            print(f"{job.label:{width}}  not measured: {sentence(error)}", flush=True)
            continue
        finally:
            gc.collect()  # the trainer, whose GPU memory the next one needs
            torch.cuda.empty_cache()
            torch.compiler.reset()  # after 8 networks of one class no more are compiled
        seconds.append(runs * row.hours * 3600)
        notes.setdefault(row.note, []).append(job.label)
        step, each = 1e3 * job.config.batch_size / row.images_per_s, duration(row.hours * 3600)
        rates = f"{step:10.2f} {row.images_per_s:10,.0f} {row.data_wait:10.0%}"
        print(f"{job.label:{width}} {rates} {each:>14} {runs:6} {duration(seconds[-1]):>19}", flush=True)
    for note in filter(None, notes):
        print(wrap(f"{', '.join(notes[note])}: {note}"))
    if not seconds:
        return 1
    fewer = f", {duration(sum(seconds) / at_once)} with {at_once} at a time" * (at_once > 1)
    print(f"all {runs * len(seconds)}: {duration(sum(seconds))}{fewer};")
    print("training and its validations, without start-up and the evaluation after it")
    return int(len(seconds) < len(first))
