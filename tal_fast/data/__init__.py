"""Images for training and evaluation: ``build_data(config.data).loader("train", batch_size=...)``."""

from tal_fast.data.bundle import DataBundle, build_data
from tal_fast.data.loaders import Loader

__all__ = ["DataBundle", "Loader", "build_data"]
