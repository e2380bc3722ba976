"""Loading a trained model from a run folder: ``load_run("runs/digits-tal").model(images)``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tal_fast.config.data import DATASETS
from tal_fast.config.schema import Config
from tal_fast.data.build import build_data
from tal_fast.data.datasets import DataBundle
from tal_fast.data.digest import data_digest
from tal_fast.methods import method_class
from tal_fast.models import build_model, keep_classes
from tal_fast.runs.checkpoint import BEST, FOLDER, LAST, Damaged, load, load_newest, restoring
from tal_fast.runs.predictions import Inference, PassOptions, feature_folder
from tal_fast.utils.logs import say
from tal_fast.utils.own_code import file_digest


@dataclass
class Run:
    """A trained model and the run it comes from."""

    config: Config  # resolved configuration of the run
    # The network in eval mode, with averaged weights if the run keeps an average (``optim.ema_decay``, FMFP): images
    # (B, C, S, S) -> logits (B, classes), features (B, D), float32.
    model: nn.Module
    epoch: int  # number of epochs the weights were trained for
    checkpoint: Path  # file of the weights
    method: str  # name of the training method
    score: str  # confidence score of the method; a key of ``tal_fast.scores.logits.SCORES``
    class_names: tuple[str, ...]  # one name for each logit
    image_size: int  # side of the validation images in pixels
    # Rows of metrics.csv, one for each finished epoch.
    history: list[dict[str, float]] = field(default_factory=list, repr=False)
    loader: str = ""  # reader of the images in training, such as ``memory``; empty where unknown
    digests: dict[str, str] = field(default_factory=dict, repr=False)  # ``data_digest`` of the images in training
    data_file: str | None = field(default=None, repr=False)  # ``file_digest`` of the user's own data set in training

    @cached_property
    def data(self) -> DataBundle:
        """Images of the run.

        Raises ValueError if they are gone, their classes have changed since training, or the validation images may
        have been trained on: they are chosen from a folder (``data.split``, ``data.holdout``) that has changed, or the
        user's own data set returns other training images. Other changes of such a data set are warned of.
        """
        bundle = build_data(self.config.data)
        if bundle.class_names != self.class_names:
            raise ValueError(
                f"the data have classes {', '.join(bundle.class_names)} but the model was trained on "
                f"{', '.join(self.class_names)}; point data.root in the run's config at the training data"
            )
        own = self.config.data.dataset not in DATASETS
        place = self.config.data.dataset if own else self.config.data.root
        chosen = [
            f"data.{name} may choose" for name in ("split", "holdout") if getattr(self.config.data, name) is not None
        ]
        now = data_digest(bundle) if own or chosen else {}
        other = [split for split in now if self.digests.get(split) not in (None, now[split])]
        if "train" in other:
            raise ValueError(
                f"the training images of {place} changed since training, so that {[*chosen, 'there may be'][0]} "
                "validation images that the model was trained on; put them back as they were, or train again"
            )
        if own and other:
            say(f"the validation images of {place} are not those in training; the results are of the new ones")
        elif own and self.data_file not in (None, file_digest(place or "")):
            say(f"the file of {place} changed since training, but gives the same training and validation images")
        return bundle

    def inference(self, cache: str | Path, options: PassOptions) -> Inference:
        """Passes of the model over the run's data, whose outputs are kept in the folder ``cache``."""
        frozen = None
        if self.config.model.cache_features:
            frozen = feature_folder(self.config, self.data.image_size, options.amp)
        return Inference(self.model, self.data, cache, options, frozen)


def load_run(
    run_dir: str | Path, checkpoint: Literal["best", "last"] = "best", device: torch.device | str = "cpu"
) -> Run:
    """Load the model of a run.

    Args:
        run_dir: the ``output`` folder of ``python -m tal_fast.train``.
        checkpoint: ``best``: the one of the highest validation accuracy; ``last``: the newest, or the one before it if
            the newest is damaged.
        device: device of the model.

    Raises:
        ValueError: the folder holds no checkpoint, or none that can be read.
    """
    run_dir = Path(run_dir)
    folder = run_dir / FOLDER
    if checkpoint not in ("best", "last"):
        raise ValueError(f"checkpoint is {checkpoint!r}; use 'best' or 'last'")
    if not any(folder.glob("*.pt")):
        train = f"python -m tal_fast.train --output {run_dir}"
        raise ValueError(f"{run_dir} holds no run of tal_fast.train; train one first with {train}")
    if checkpoint == "best":
        path = folder / BEST
        try:
            content = load(path)
        except Damaged as error:
            raise Damaged(f"{error}; use --checkpoint last") if (folder / LAST).is_file() else error from None
    else:
        content, path, _ = load_newest(folder)
    shape: dict[str, Any] = content["shape"]
    with restoring(path):
        config = Config.from_dict(content["config"])
        classes = len(shape["class_names"])
    method = method_class(config.method.name)  # a missing file of the user's own is no damage
    with restoring(path):
        model = build_model(config.model, classes + method.extra_classes, shape["channels"], shape["image_size"])
        model.load_state_dict(content["model"] if content["average"] is None else content["average"])
        keep_classes(model, classes)
    return Run(
        config=config,
        model=model.to(device).eval(),
        epoch=content["epoch"],
        checkpoint=path,
        method=method.name,
        score=method.score,
        class_names=tuple(shape["class_names"]),
        image_size=shape["image_size"],
        history=content["history"],
        loader=shape.get("conditions", {}).get("data.loader", ""),
        digests=shape.get("digests", {}),
        data_file=shape.get("conditions", {}).get("the data set's file"),
    )
