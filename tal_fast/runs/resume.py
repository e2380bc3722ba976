"""Finding the checkpoint a run resumes from, and refusing one of another configuration or other data."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from tal_fast.config.methods import option_values, read_options
from tal_fast.config.schema import Config
from tal_fast.methods import method_class
from tal_fast.runs import checkpoint
from tal_fast.runs.folder import METRICS_FILE
from tal_fast.utils.locks import FolderLock

logger = logging.getLogger(__name__)

MAY_DIFFER = {
    "output",
    "resume",
    "eval_batch_size",
    "device",
    "threads",
    "rank_timeout",
    "progress",
    "checkpoint_every_steps",
    "keep_every_epochs",
    "logger",
    "log_every_steps",
    "profile",
    "cuda_graphs",
    "data.root",
    "data.ood",
    "data.loader",
    "data.workers",
    "data.file_list",
    "data.max_unreadable",
    "model.compile",
    "model.channels_last",
    "method.options.backend",
    "method.options.outliers",
}
"""Options that a resumed run may change: where and how fast it runs, not what it computes."""


RESTART_WAIT_S = 120.0
"""Seconds that a restarted rank waits for the lock of the one before: NFS keeps that of a lost machine for 90."""

REQUEUE_WAIT_S = 20.0
"""Seconds that ``resume: auto`` waits for the lock of the run before, which may still be saving."""


def find_checkpoint(config: Config, lock: FolderLock | None = None) -> tuple[dict[str, Any], Path] | None:
    """Checkpoint that ``config.resume`` asks for, with its path; None for a new run.

    ``lock`` is acquired before an existing output folder is read, and stays so.

    Raises:
        ValueError: the output folder holds another run or is in use, or the checkpoint is of another configuration.
        Damaged: there are checkpoints, but none can be read.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    folder = output / checkpoint.FOLDER
    # torchrun restarts a failed run with the same command line (--max-restarts).
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    resume = "auto" if config.resume == "never" and restarted else config.resume
    if lock is not None and output.is_dir():
        lock.acquire(RESTART_WAIT_S if restarted else REQUEUE_WAIT_S if resume == "auto" else 0.0)
    if resume == "never":
        refuse_existing_run(output)
        return None
    if resume == "auto":
        if not checkpoint.exists(folder):
            return None
        content, path, problems = checkpoint.load_newest(folder)
        for problem in problems:
            logger.warning("%s; going on from %s instead", problem, path)
    else:
        path = Path(resume)
        if holds_run(output) and path.absolute().parent != folder.absolute():
            raise ValueError(
                f"{output} holds a run already, which resuming from {path} would overwrite; name another --output"
            )
        content = checkpoint.load(path)
    differing = differences(content["config"], config)
    if differing:
        raise ValueError(
            f"{path} was made by another configuration ({', '.join(differing)}); set it back, or start anew in another "
            "--output"
        )
    return content, path


def holds_run(output: Path) -> bool:
    """Whether a folder holds results of a run; config.yaml alone is of one that ended before it saved anything."""
    return checkpoint.exists(output / checkpoint.FOLDER) or (output / METRICS_FILE).exists()


def refuse_existing_run(output: Path) -> None:
    """Raise ValueError if a folder holds a run."""
    if holds_run(output):
        raise ValueError(f"{output} holds a run already; continue it with --resume auto, or name another --output")


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Differences in what a saved configuration and ``config`` compute, such as ``epochs was 4 and is 5``."""
    before, now = _all_options(Config.from_dict(saved)), _all_options(config)
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**now, **before}
        if before.get(name) != now.get(name) and name not in MAY_DIFFER
    ]


def refuse_other_data(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the classes or the image size of a checkpoint are not those of the data."""
    for name, title in (("class_names", "the classes"), ("image_size", "the image size")):
        if saved[name] != now[name]:
            raise ValueError(
                f"{path} was made with {title} {saved[name]} but the data have {now[name]}; "
                "point data.root at the same data, or start anew in another --output"
            )


def changed_conditions(saved: dict[str, Any], world_size: int, train_images: int) -> list[str]:
    """Changes since a checkpoint that rule out going on within its epoch, and bit for bit, such as ``ranks 2 -> 1``."""
    conditions = (
        ("ranks", saved["world_size"], world_size),
        ("training images", saved["shape"]["train_images"], train_images),
    )
    return [f"{title} {before} -> {now}" for title, before, now in conditions if before != now]


def _all_options(config: Config) -> dict[str, Any]:
    """Dotted name -> value of all options, with the defaults of the method's own."""
    name, flat = config.method.name, config.flat()
    own = option_values(read_options(name, method_class(name).Options, config.method.options))
    return {**flat, **{f"method.options.{option}": value for option, value in own.items()}}
