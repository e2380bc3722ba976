"""Finding the checkpoint a run goes on from, and refusing what would spoil a run."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tal_fast.config.methods import read_options
from tal_fast.config.schema import Config
from tal_fast.runs import checkpoint as checkpoints

CONFIG_FILE, METRICS_FILE = "config.yaml", "metrics.csv"

MAY_DIFFER = {
    "output",
    "resume",
    "eval_batch_size",
    "device",
    "threads",
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
"""Options a resumed run may have otherwise than before: where and how fast it runs, not what it computes."""


def find_checkpoint(config: Config, say: Callable[[str], None]) -> tuple[dict[str, Any], Path] | None:
    """The checkpoint that ``config.resume`` asks for, if there is one.

    Args:
        config: of the run that starts now.
        say: told of damaged checkpoints that are passed over.

    Raises:
        ValueError: the output folder holds another run, or the checkpoint is of another configuration.
        Damaged: there are checkpoints, but none can be read.
    """
    output = Path(config.output)
    folder = output / checkpoints.FOLDER
    holds_run = checkpoints.exists(folder) or any((output / f).exists() for f in (CONFIG_FILE, METRICS_FILE))
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    resume = config.resume
    if resume == "never" and _restarted_by_torchrun():
        resume = "auto"
    if resume == "never":
        if holds_run:
            raise ValueError(
                f"{output} holds a run already; go on with it with --resume auto, or name another --output"
            )
        return None
    if resume == "auto":
        if not checkpoints.exists(folder):
            return None
        content, path, problems = checkpoints.load_newest(folder)
        for problem in problems:
            say(f"warning: {problem}; going on from {path} instead")
    else:
        path = Path(resume)
        if holds_run and path.absolute().parent != folder.absolute():
            raise ValueError(
                f"{output} holds a run already, which resuming from {path} would overwrite; name another --output"
            )
        content = checkpoints.load(path)
    _refuse_other_config(content["config"], config, path)
    return content, path


def _restarted_by_torchrun() -> bool:
    """Whether torchrun starts this process anew, after one of its processes died (``--max-restarts``)."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """What a configuration computes otherwise than a saved one, such as ``epochs was 4 and is 5``."""
    before, now = _computed(Config.from_dict(saved)), _computed(config)
    return [
        f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
        for name in {**now, **before}
        if before.get(name) != now.get(name) and name not in MAY_DIFFER
    ]


def _computed(config: Config) -> dict[str, Any]:
    """All options, those of the method's own too, be they given or its defaults."""
    from tal_fast.methods import method_class  # here, for it loads torch

    values = config.to_dict()
    name = config.method.name
    values["method"]["options"] = asdict(read_options(name, method_class(name).Options, config.method.options))
    return _flat(values)


def _refuse_other_config(saved: dict[str, Any], config: Config, path: Path) -> None:
    differing = differences(saved, config)
    if differing:
        raise ValueError(
            f"{path} was made by another configuration ({', '.join(differing)}); set it back, or start anew in another "
            "--output"
        )


def refuse_other_data(saved: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    """ValueError if a checkpoint's classes or image size are not those of the data."""
    for name, what in (("class_names", "the classes"), ("image_size", "the image size")):
        if saved[name] != now[name]:
            raise ValueError(
                f"{path} was made with {what} {saved[name]} but the data have {now[name]}; "
                "point data.root at the same data, or start anew in another --output"
            )


def changes(saved: dict[str, Any], world_size: int, train_images: int) -> list[str]:
    """What is no longer as it was, so that the run cannot go on inside an epoch nor bit for bit."""
    pairs = (
        ("ranks", saved["world_size"], world_size),
        ("training images", saved["shape"]["train_images"], train_images),
    )
    return [f"{what} {before} -> {now}" for what, before, now in pairs if before != now]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "ood":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
