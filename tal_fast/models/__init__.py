"""Networks that return logits and features."""

from tal_fast.models.build import build_model
from tal_fast.models.features import FeatureLinear, expose_features, head_path, keep_classes, without_head

__all__ = ["FeatureLinear", "build_model", "expose_features", "head_path", "keep_classes", "without_head"]
