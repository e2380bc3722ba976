"""Sharpness-aware minimisation (SAM)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class SAM:
    """Perturbation of the weights in sharpness-aware minimisation.

    Foret et al., "Sharpness-Aware Minimization", ICLR 2021, algorithm 1. From the gradient g at the weights w,
    ``perturb`` moves the weights to w + ρ g / ‖g‖, with the norm over all weights together. The caller takes the
    gradient there, ``restore`` returns to w, and the optimizer steps by that gradient. Nothing waits for the device. A
    gradient scaler's factor cancels; where it made g infinite, the weights stay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], radius: float) -> None:
        self._parameters: list[Tensor] = [p for p in parameters if p.requires_grad]
        self._radius = radius
        # Copies, because (w + e) - e differs from w in floating point.
        self._originals = [torch.empty_like(p, requires_grad=False) for p in self._parameters]

    @torch.no_grad()
    def perturb(self) -> None:
        """Move the weights along their gradients; those without a gradient stay."""
        torch._foreach_copy_(self._originals, self._parameters)
        moved = [(p, p.grad) for p in self._parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([gradient for _, gradient in moved])))
        scale = self._radius / (norm + 1e-12)
        for parameter, gradient in moved:
            parameter.add_(torch.where(norm.isfinite(), gradient * scale, 0.0))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights from before ``perturb``, bit for bit."""
        torch._foreach_copy_(self._parameters, self._originals)
