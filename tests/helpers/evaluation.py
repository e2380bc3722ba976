"""Untrained runs and model outputs for the tests of the evaluator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tal_fast.config.schema import Config
from tal_fast.loss.queue import FeatureQueue
from tal_fast.models import build_model
from tal_fast.runs import checkpoint, predictions
from tests.helpers.checkpoints import content

SYNTHETIC = {"dataset": "synthetic", "crop_area": None, "image_size": 16, "channels": 1, "synthetic_images": 400}
"""400 training, 200 validation and 1,000 OOD images (``noise``) of 10 classes."""


def make_run(
    folder: Path,
    method: str = "tal",
    *,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    classes: Sequence[str] = (),
    ranks: list[Any] | None = None,
) -> Path:
    """Create the folder of a run with random weights, as the trainer would leave it.

    Args:
        folder: folder to create.
        method: training method.
        seed: seed of the weights.
        data: data configuration; default ``SYNTHETIC``.
        classes: class names; default those of ``SYNTHETIC``.
        ranks: states of the ranks; default one, for TAL with a queue of 40 entries.
    """
    data = data or SYNTHETIC
    classes = list(classes) or [f"bars-{c}" for c in range(10)]
    config = Config.from_dict(
        {"data": data, "model": {"name": "cifar_resnet8", "width": 4}, "method": {"name": method}}
    )
    channels, size = config.data.channels, config.data.image_size or 16
    torch.manual_seed(seed)
    model = build_model(config.model, len(classes), channels, size)
    if ranks is None:
        ranks = [queue_state(40)] if method == "tal" else [{"method": {}}]
    checkpoint.save(
        folder / "checkpoints" / "best.pt",
        content(
            config=config.to_dict(),
            epoch=7,
            world_size=len(ranks),
            model=model.state_dict(),
            shape={"class_names": classes, "channels": channels, "image_size": size, "train_images": 400},
            ranks=ranks,
            history=[],
        ),
    )
    return folder


def queue_state(entries: int, capacity: int = 50, seed: int = 0) -> dict[str, Any]:
    """State of a rank of a TAL run, with a queue of random entries."""
    torch.manual_seed(seed)
    queue = FeatureQueue(capacity)
    queue.push(torch.rand(entries), torch.rand(entries))
    return {"method": {f"loss_fn.queue.{name}": value for name, value in queue.state_dict().items()}}


def write_npz(path: Path, **changes: Any) -> Path:
    """Write outputs of a classifier of 5 classes, most of them correct, with an OOD set; None removes an array."""
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=200)
    logits = rng.normal(size=(200, 5)).astype(np.float32)
    logits[np.arange(200), labels] += 3 * rng.random(200).astype(np.float32)
    arrays: dict[str, Any] = {"logits": logits, "labels": labels, "ood_noise_logits": 0.5 * rng.normal(size=(90, 5))}
    arrays |= changes
    np.savez(path, **{name: values for name, values in arrays.items() if values is not None})
    return path


def read_json(folder: Path) -> dict[str, Any]:
    """The report in a folder."""
    return json.loads((folder / "report.json").read_text())


def record_passes(monkeypatch: Any) -> list[str]:
    """Names of the splits that a model is run over from now on."""
    names: list[str] = []
    run_model = predictions.run_model

    def record(model: nn.Module, loader: Any, device: Any, name: str, *rest: Any) -> Any:
        names.append(name)
        return run_model(model, loader, device, name, *rest)

    monkeypatch.setattr(predictions, "run_model", record)
    return names


class Page(HTMLParser):
    """Elements of an HTML page with their attributes, and its text without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._words: list[str] = []
        self._hidden = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all elements of a tag."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self) -> list[str]:
        """Text alternatives of the risk-coverage charts."""
        return [svg["aria-label"] or "" for svg in self.all("svg") if svg.get("data-kind") == "risk"]

    @property
    def text(self) -> str:
        """Text with single spaces."""
        return " ".join(" ".join(self._words).split())
