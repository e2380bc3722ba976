"""Typicalness-aware loss, its queue, and the backends that compute them."""

from tal_fast.loss.linear import TALLinearLoss
from tal_fast.loss.module import TALLoss
from tal_fast.loss.queue import FeatureQueue
from tal_fast.loss.reference import TALStats

__all__ = ["FeatureQueue", "TALLinearLoss", "TALLoss", "TALStats"]
