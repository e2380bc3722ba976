"""Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Ascent:
    """The way up and back of a step of SAM (Foret et al., "Sharpness-Aware Minimization", ICLR 2021, algorithm 1).

    With a gradient g in place, ``climb`` moves the weights w to w + ρ g / ‖g‖, where the caller takes the gradient that
    the optimizer then steps by, from w, to which ``back`` returns. The norm is over all weights together. Nothing
    waits for the device; a gradient scaler's factor cancels, and where it made g infinite, w stays.

    Args:
        parameters: of the network.
        radius: ρ, above 0.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], radius: float) -> None:
        self._parameters: list[Tensor] = [p for p in parameters if p.requires_grad]
        self._radius = radius
        # Kept rather than subtracted from: (w + e) - e is not w in floating point.
        self._kept = [torch.empty_like(p, requires_grad=False) for p in self._parameters]

    @torch.no_grad()
    def climb(self) -> None:
        """Up the gradients that the parameters have; one without stays."""
        torch._foreach_copy_(self._kept, self._parameters)
        moved = [(p, p.grad) for p in self._parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([gradient for _, gradient in moved])))
        scale = self._radius / (norm + 1e-12)
        for parameter, gradient in moved:
            parameter.add_(torch.where(norm.isfinite(), gradient * scale, 0.0))

    @torch.no_grad()
    def back(self) -> None:
        """To the weights before ``climb``, to the bit."""
        torch._foreach_copy_(self._parameters, self._kept)
