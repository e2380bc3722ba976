"""Networks that return logits and features."""

from tal_fast.models.build import build_model
from tal_fast.models.features import FeatureLinear, expose_features, keep_classes

__all__ = ["FeatureLinear", "build_model", "expose_features", "keep_classes"]
