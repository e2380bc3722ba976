"""A finished or unfinished run, loaded for evaluation: ``load_run("runs/digits-tal").model(images)``."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from tal_fast.config.schema import Config
from tal_fast.data import DataBundle, build_data
from tal_fast.methods import method_class
from tal_fast.models import build_model, keep_classes
from tal_fast.runs import checkpoint as checkpoints


@dataclass
class Run:
    """A trained model with what it was trained on.

    Attributes:
        config: the run's resolved configuration.
        model: in eval mode, with the averaged weights if the run keeps an average (``optim.ema_decay``, FMFP's);
            images (B, C, S, S) -> logits (B, classes), features (B, D), float32.
        epoch: epochs the weights were trained for.
        checkpoint: the file they come from.
        method: what it was trained with.
        score: confidence score the method is judged by; a key of ``tal_fast.scores.SCORES``.
        class_names: a name for each logit.
        history: a row of metrics.csv for each finished epoch.
    """

    config: Config
    model: nn.Module
    epoch: int
    checkpoint: Path
    method: str
    score: str
    class_names: tuple[str, ...]
    history: list[dict[str, float]] = field(default_factory=list, repr=False)

    @cached_property
    def data(self) -> DataBundle:
        """The run's images, found and checked at the first use.

        Raises:
            ValueError: they have gone, or their classes have changed since training.
        """
        bundle = build_data(self.config.data)
        if bundle.class_names != self.class_names:
            raise ValueError(
                f"the data have classes {', '.join(bundle.class_names)} but the model was trained on "
                f"{', '.join(self.class_names)}; point data.root in the run's config at the training data"
            )
        return bundle


def load_run(
    run_dir: str | Path, checkpoint: Literal["best", "last"] = "best", device: torch.device | str = "cpu"
) -> Run:
    """Load a run's model.

    Args:
        run_dir: the ``output`` folder of ``python -m tal_fast.train``.
        checkpoint: ``best``: of the highest validation accuracy; ``last``: the newest (or the one before, when the
            newest is damaged).
        device: where the model goes.

    Raises:
        ValueError: no such folder, no checkpoint in it, or none that can be read.
    """
    run_dir = Path(run_dir)
    folder = run_dir / checkpoints.FOLDER
    if not run_dir.is_dir():
        raise ValueError(f"there is no run folder {run_dir}")
    if checkpoint == "best":
        path = folder / checkpoints.BEST
        content = checkpoints.load(path)
    elif checkpoint == "last":
        content, path, _ = checkpoints.load_newest(folder)
    else:
        raise ValueError(f"checkpoint is {checkpoint!r}; use 'best' or 'last'")
    config = Config.from_dict(content["config"])
    shape: dict[str, Any] = content["shape"]
    method, classes = method_class(config.method.name), len(shape["class_names"])
    model = build_model(config.model, classes + method.extra_classes, shape["channels"], shape["image_size"])
    model.load_state_dict(content["model"] if content["average"] is None else content["average"])
    keep_classes(model, classes)
    return Run(
        config=config,
        model=model.to(device).eval(),
        epoch=content["epoch"],
        checkpoint=path,
        method=config.method.name,
        score=method.score,
        class_names=tuple(shape["class_names"]),
        history=content["history"],
    )
