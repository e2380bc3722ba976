"""Images for training and evaluation: ``build_data(config.data).loader("train", batch_size=...)``."""

from tal_fast.data.datasets import DataBundle, build_data
from tal_fast.data.loader import Loader

__all__ = ["DataBundle", "Loader", "build_data"]
