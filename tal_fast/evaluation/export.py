"""Selective classifiers: a network, a confidence score and a threshold as one module, exported by ``torch.export``."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tal_fast.scores.logits import SCORES
from tal_fast.utils.io import replacing

STATE, PROGRAM = "selective.pt", "selective.pt2"


class SelectiveClassifier(nn.Module):
    """Classifier that accepts predictions above a confidence threshold and abstains from the others.

    Args:
        model: images -> logits (B, C), or (logits, features).
        score: name from ``tal_fast.scores.SCORES``.
        threshold: a prediction is accepted if its confidence is strictly above; part of the state dict.
    """

    threshold: Tensor

    def __init__(self, model: nn.Module, score: str, threshold: float) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"unknown score {score!r}; choose from {', '.join(SCORES)}")
        self.model = model
        self.score = score
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Classify images (B, channels, H, W).

        Returns the predicted class (B,) int64, confidence (B,) float64, and whether the prediction is accepted (B,)
        bool.
        """
        outputs = self.model(images)
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        confidence = SCORES[self.score](logits)
        return logits.argmax(1), confidence, confidence > self.threshold


def export(classifier: SelectiveClassifier, images: Tensor, folder: str | Path) -> list[Path]:
    """Write an exported program and a state dict; return their paths.

    ``selective.pt2`` takes any batch size (``torch.export.load(path).module()(images)``); ``selective.pt`` is the
    state dict.

    Args:
        classifier: on the CPU; it is put into eval mode and its gradients are turned off.
        images: example input, two images or more.
        folder: created if it does not exist.

    Raises:
        ValueError: the model cannot be exported; the state dict is written nevertheless.
    """
    folder = Path(folder)
    classifier.eval().requires_grad_(False)
    (folder / PROGRAM).unlink(missing_ok=True)  # it may be of other weights
    with replacing(folder / STATE) as temporary:
        torch.save(classifier.state_dict(), temporary)
    try:
        program = torch.export.export(classifier, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as problem:
        # torch.export raises errors of many types, depending on the model.
        raise ValueError(
            f"torch.export cannot take the model ({str(problem).splitlines()[0]}); {folder / STATE} holds its weights "
            f"and the threshold"
        ) from problem
    with replacing(folder / PROGRAM) as temporary:
        torch.export.save(program, temporary)
    return [folder / PROGRAM, folder / STATE]
