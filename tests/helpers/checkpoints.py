"""Content of a checkpoint as small as one can be."""

from __future__ import annotations

from typing import Any

import torch


def content(**changes: Any) -> dict[str, Any]:
    """Content of a checkpoint of one rank after one epoch, with entries changed or added."""
    return {
        "config": {"epochs": 3},
        "shape": {"class_names": ["a", "b"], "channels": 1, "image_size": 8, "train_images": 100},
        "epoch": 1,
        "step": 0,
        "world_size": 1,
        "model": {"weight": torch.arange(5.0)},
        "average": None,
        "scaler": {},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "ranks": [{"method": {}}],
        "best": {},
        "history": [{"epoch": 1, "train_loss": 0.5}],
        **changes,
    }
