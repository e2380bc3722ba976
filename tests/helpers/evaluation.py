"""Untrained runs for the tests of the evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tal_fast.config.schema import Config
from tal_fast.models import build_model
from tal_fast.runs import checkpoint


def make_run(folder: Path, method: str = "tal", seed: int = 0, data: dict[str, Any] | None = None) -> Path:
    """A run with fresh weights, as the trainer would leave it."""
    data = data or {"dataset": "synthetic", "crop_area": None, "image_size": 16, "channels": 1}
    config = Config.from_dict(
        {"data": data, "model": {"name": "cifar_resnet8", "width": 4}, "method": {"name": method}}
    )
    classes = [f"bars-{c}" for c in range(10)] if data["dataset"] == "synthetic" else ["cat", "dog"]
    channels, size = config.data.channels, config.data.image_size or 16
    torch.manual_seed(seed)
    model = build_model(config.model, len(classes), channels, size)
    checkpoint.save(
        folder / "checkpoints" / "best.pt",
        {
            "config": config.to_dict(), "epoch": 7, "step": 0, "world_size": 1, "model": model.state_dict(),
            "shape": {"class_names": classes, "channels": channels, "image_size": size},
            "average": None, "optimizer": {}, "scaler": None, "ranks": [], "best": 0.0, "history": [],
        },
    )  # fmt: skip
    return folder
