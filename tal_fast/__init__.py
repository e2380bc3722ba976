"""Typicalness-Aware Learning (Liu et al., NeurIPS 2024): confidence that separates correct predictions from errors.

``TALLoss`` is the loss, ``FeatureQueue`` its queue of past samples, ``tal_fast.functional`` the loss for those who keep
their own; ``tal_fast.loss.reference`` defines all of it in plain PyTorch. ``python -m tal_fast.train`` trains,
``python -m tal_fast.evaluate`` reports how well confidence separates correct predictions from errors, ``Classifier``
predicts and abstains, and ``python -m tal_fast.info`` says what runs on this machine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = ["Classifier", "FeatureQueue", "TALLinearLoss", "TALLoss", "TALStats", "__version__"]

if TYPE_CHECKING:
    from tal_fast.evaluation.classifier import Classifier
    from tal_fast.loss import FeatureQueue, TALLinearLoss, TALLoss, TALStats


def __getattr__(name: str) -> Any:
    # Lazy: the metrics are useful without torch's start-up time.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{'evaluation.classifier' if name == 'Classifier' else 'loss'}"), name)
