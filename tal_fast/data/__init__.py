"""Images for training and evaluation: ``build_data(config.data).loader("train", batch_size=...)``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tal_fast.data.build import build_data
    from tal_fast.data.datasets import DataBundle
    from tal_fast.data.loader import Loader

__all__ = ["DataBundle", "Loader", "build_data"]
_MODULES = {"DataBundle": "datasets", "Loader": "loader", "build_data": "build"}


def __getattr__(name: str) -> Any:
    # Lazy: check_data shows its help without waiting for torch.
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
