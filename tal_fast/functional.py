"""Functional form of the loss, for callers who keep their own queue."""

from tal_fast.loss.functional import TALStats, feature_statistics, nearest_distance, tal_loss
from tal_fast.loss.linear import linear_tal_loss

__all__ = ["TALStats", "feature_statistics", "linear_tal_loss", "nearest_distance", "tal_loss"]
