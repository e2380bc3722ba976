"""Finding the checkpoint a run resumes from, and what may have changed since it was saved."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from tal_fast.config.methods import option_values, read_options
from tal_fast.config.schema import TRAINING_IMAGES, Config
from tal_fast.config.typed import one_line
from tal_fast.methods import method_class
from tal_fast.runs import checkpoint
from tal_fast.runs.folder import METRICS_FILE
from tal_fast.utils.io import check_writable
from tal_fast.utils.locks import FolderLock

logger = logging.getLogger(__name__)

SAME_BITS = frozenset({
    "output", "resume", "allow", "extend", "progress", "checkpoint_every_steps", "keep_every_epochs", "validate_every",
    "logger", "log_every_steps", "profile", "data.root", "data.ood", "data.workers", "data.max_unreadable",
    "data.timeout", "rank_timeout",
})  # fmt: skip
"""Options that a resumed run may change without changing what it computes."""

WARNED = frozenset({
    "eval_batch_size", "device", "threads", "cuda_graphs", "data.loader", "data.file_list", "model.compile",
    "model.channels_last", "method.options.backend", "method.options.outliers",
})  # fmt: skip
"""Options that a resumed run may change, with a warning that it no longer goes on bit for bit."""

FIXED = frozenset({
    "data.channels", "data.image_size", "data.unseen_classes", "model.name", "model.width", "model.head",
    "model.weights", "model.weights_key", "model.freeze", "optim.name", "optim.decay_all", "optim.ema_decay",
    "optim.layer_decay", "method.name", "method.options.queue_scope",
})  # fmt: skip
"""Options that a resumed run cannot change, because the saved state would not fit. A change of any option that is in
none of these sets is refused unless ``config.allow`` names it."""

_IMAGES = (
    "data.dataset", "data.label_key", "data.split", "data.split_seed", "data.file_list", "data.holdout",
    "data.train_limit", "data.synthetic_images",
)  # fmt: skip
"""Options that choose the training images, so that a change of the images is no surprise."""

_NEW_EPOCH = {"ranks", "training images", "seed", "batch_size"}
"""Changes after which the steps of an epoch no longer hold the same images."""

RESTART_WAIT_S = 120.0
"""Seconds that a restarted rank waits for the lock of the one before: NFS keeps the lock of a lost machine for 90."""

REQUEUE_WAIT_S = 20.0
"""Seconds that ``resume: auto`` waits for the lock of the run before, which may still be saving."""

Changes = dict[str, tuple[Any, Any]]
"""Name of what has changed -> its values before and now."""


def find_checkpoint(config: Config, lock: FolderLock | None = None) -> tuple[dict[str, Any], Path] | None:
    """Checkpoint that ``config.resume`` asks for, with its path; None for a new run.

    ``lock`` is acquired before an existing output folder is read, and stays so. Raises ValueError if the folder holds
    another run or is in use, or the checkpoint is of another configuration, Damaged if none can be read, and OSError if
    the folder cannot be written.
    """
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output {output} is a file; name a folder")
    folder = output / checkpoint.FOLDER
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, where the checkpoints go; remove it, or name another --output")
    check_writable(output)
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
    refuse_other_options(content["config"], config, path)
    best, epoch = folder / checkpoint.BEST, content["best"].get("epoch", 0)
    if epoch and not (best.is_file() and best.stat().st_size):
        logger.warning(
            "%s, the weights of epoch %d, is missing or empty, and is written by the next better epoch; until then use "
            "--checkpoint last to evaluate", best, epoch,
        )  # fmt: skip
    return content, path


def holds_run(output: Path) -> bool:
    """Whether a folder holds results of a run; config.yaml alone is of one that ended before it saved anything."""
    return checkpoint.exists(output / checkpoint.FOLDER) or (output / METRICS_FILE).exists()


def refuse_existing_run(output: Path) -> None:
    """Raise ValueError if a folder holds a run."""
    if holds_run(output):
        raise ValueError(f"{output} holds a run already; continue it with --resume auto, or name another --output")


def following(saved: Config, config: Config) -> Config:
    """Configuration in which options that the weights decide are as saved, so that their file is not needed again.

    ``saved`` is the run's configuration; one that starts from other weights, or from none, stays as it is.
    """
    if config.model.weights is None or config.model.weights != saved.model.weights:
        return config
    config = replace(config, data=replace(config.data))
    config.data.follow(asdict(saved.data))
    return config


def changed_options(saved: dict[str, Any], config: Config) -> Changes:
    """Options in which ``config`` differs from a saved configuration, except those of ``SAME_BITS``."""
    earlier = Config.from_dict(saved)
    before, now = _all_options(earlier), _all_options(following(earlier, config))
    pairs = {name: (before.get(name), now.get(name)) for name in {**now, **before} if name not in SAME_BITS}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def differences(saved: dict[str, Any], config: Config) -> list[str]:
    """Differences in what a saved configuration and ``config`` compute, such as ``epochs was 4 and is 5``."""
    changed = changed_options(saved, config)
    return [_were([name], changed) for name in changed if name not in WARNED]


def refuse_other_options(saved: dict[str, Any], config: Config, path: Path) -> None:
    """Raise ValueError if options have changed since a checkpoint without being allowed to."""
    try:
        changed = changed_options(saved, config)
    except ValueError as error:
        raise checkpoint.Damaged(f"the configuration in {path} cannot be read: {one_line(error)}") from None
    fixed = [name for name in changed if name in FIXED]
    if fixed:
        raise ValueError(
            f"{path} was made by another configuration ({_were(fixed, changed)}), which its state does not fit; "
            "set it back, or start anew in another --output"
        )
    allowed = _allowed(config)
    longer = "epochs" in changed and changed["epochs"][1] > changed["epochs"][0]
    if config.extend and longer:
        allowed.add("epochs")
    refused = [name for name in changed if name not in WARNED and name not in allowed]
    if refused:
        remedy = "--extend" if refused == ["epochs"] and longer else f"--allow {','.join(refused)}"
        raise ValueError(
            f"{path} was made by another configuration ({_were(refused, changed)}); set it back, start anew in "
            f"another --output, or go on with it by {remedy}"
        )


def refuse_other_data(content: dict[str, Any], shape: dict[str, Any], config: Config, path: Path) -> None:
    """Raise ValueError if a checkpoint's classes, image size or training images are not those of the data.

    ``shape`` is ``tal_fast.training.state.data_shape`` of the data now; the configuration may allow other training
    images, or have options that choose others.
    """
    saved = content["shape"]
    for name, title in (("class_names", "the classes"), ("image_size", "the image size")):
        if saved[name] != shape[name]:
            raise ValueError(
                f"{path} was made with {title} {saved[name]} but the data have {shape[name]}; "
                "point data.root at the same data, or start anew in another --output"
            )
    if _digest(saved, "train") in (None, _digest(shape, "train")) or TRAINING_IMAGES in _allowed(config):
        return
    if not any(name in _IMAGES for name in changed_options(content["config"], config)):
        raise ValueError(
            f"the {shape['train_images']:,} training images are not the {saved['train_images']:,} that {path} was made "
            "with: files were added, removed, moved or changed; point data.root at the same data, or go on with these "
            f"by --allow {TRAINING_IMAGES.replace('_', '-')}"
        )


def changes(content: dict[str, Any], shape: dict[str, Any], config: Config, world_size: int) -> dict[str, str]:
    """Changes since a checkpoint after which a run does not go on bit for bit: name -> text such as ``ranks 2 -> 1``.

    ``shape["conditions"]`` are what options and defaults come to on this machine, by the options' names; they are
    compared in place of the options, except with checkpoints of version 0.2.0, which have none.
    """
    saved = content["shape"]
    found = changed_options(content["config"], config)
    before = saved.get("conditions", {})
    found = {name: pair for name, pair in found.items() if name not in before}
    found |= {name: (before[name], now) for name, now in shape.get("conditions", {}).items() if name in before}
    found["ranks"] = content["world_size"], world_size
    found["training images"] = saved["train_images"], shape["train_images"]
    texts = {name: f"{name} {short(was)} -> {short(now)}" for name, (was, now) in found.items() if was != now}
    for name, split in (("training images", "train"), ("validation images", "val")):
        if _digest(saved, split) not in (None, _digest(shape, split)):
            texts.setdefault(name, f"other {name}")
    return texts


def leaves_epoch(names: Iterable[str]) -> bool:
    """Whether, after these changes, a run can only go on from the start of its epoch."""
    return not _NEW_EPOCH.isdisjoint(names)


def _digest(shape: dict[str, Any], split: str) -> str | None:
    return shape.get("digests", {}).get(split)


def _allowed(config: Config) -> set[str]:
    return {name.replace("-", "_") for name in config.allow}


def _were(names: Iterable[str], changed: Changes) -> str:
    return ", ".join(f"{name} was {short(changed[name][0])} and is {short(changed[name][1])}" for name in names)


def _all_options(config: Config) -> dict[str, Any]:
    """Dotted name -> value of all options, with the defaults of the method's own."""
    name, prefix = config.method.name, "method.options."
    own = option_values(read_options(name, method_class(name).Options, config.method.options))
    resolved = {"data.crop_fraction": config.data.central_crop, "data.interpolation": config.data.resampling}
    flat = {**config.flat(), **resolved}
    others = {option: value for option, value in flat.items() if not option.startswith(prefix)}
    return others | {prefix + option: value for option, value in own.items()}
