"""Sharpness-aware minimisation (SAM), and friendly SAM (F-SAM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SAM:
    """Perturbation of the weights in sharpness-aware minimisation.

    Foret et al., "Sharpness-Aware Minimization", ICLR 2021, algorithm 1. From the gradient g at the weights w,
    ``perturb`` moves the weights to w + ρ d / ‖d‖, with d = g and the norm over all weights together. The caller takes
    the gradient there, ``restore`` returns to w, and the optimizer steps by that gradient. Nothing waits for the
    device. Where a gradient scaler made g infinite, the weights and the average stay.

    Friendly SAM (Li et al., "Friendly Sharpness-Aware Minimization", CVPR 2024) takes d = g - σ m, where m is the
    average of the gradients of earlier steps: m ← λ m + (1 - λ) g; in the first step d = g and m = g.

    Args:
        network: its weights that train are moved; weights without a gradient stay.
        radius: ρ.
        sigma: σ; 0 is SAM.
        decay: λ.
        keep_buffers: undo in ``restore`` what the second pass did to the network's buffers, such as the running
            statistics of BatchNorm.
    """

    def __init__(
        self, network: nn.Module, radius: float, sigma: float = 0.0, decay: float = 0.0, keep_buffers: bool = False
    ) -> None:
        self._parameters: list[Tensor] = [p for p in network.parameters() if p.requires_grad]
        self._radius, self._sigma, self._decay = radius, sigma, decay
        # Copies, because (w + e) - e differs from w in floating point.
        self._originals = [torch.empty_like(p, requires_grad=False) for p in self._parameters]
        self._average = [torch.zeros_like(p, requires_grad=False) for p in self._parameters] if sigma else []
        self._next: list[tuple[Tensor, Tensor]] = []
        self._started = torch.zeros(1, device=self._parameters[0].device)  # whether the average holds a gradient
        self._kept = network if keep_buffers else nn.Module()
        self._buffers: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def perturb(self, factor: Tensor | float = 1.0) -> None:
        """Move the weights along their gradients, which a gradient scaler has multiplied by ``factor``."""
        torch._foreach_copy_(self._originals, self._parameters)
        self._buffers = [(buffer, buffer.clone()) for buffer in self._kept.buffers()]
        moved = [(i, p.grad) for i, p in enumerate(self._parameters) if p.grad is not None]
        directions = moved
        if self._sigma:
            moved = [(i, gradient / factor) for i, gradient in moved]
            directions = [(i, gradient - self._sigma * self._average[i]) for i, gradient in moved]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm([direction for _, direction in directions])))
        scale, finite = self._radius / (norm + 1e-12), norm.isfinite()
        for i, direction in directions:
            self._parameters[i].add_(torch.where(finite, direction * scale, 0.0))
        if self._sigma:
            share = torch.where(self._started > 0, 1 - self._decay, 1.0)
            # Not yet in place: the second pass may fail. DDP writes the gradients of that pass over those of this one.
            self._next = [
                (average := self._average[i], torch.where(finite, torch.lerp(average, gradient, share), average))
                for i, gradient in moved
            ]
            self._next.append((self._started, torch.where(finite, 1.0, self._started)))

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the weights from before ``perturb``, and the buffers where they are kept, bit for bit."""
        torch._foreach_copy_(self._parameters, self._originals)
        for buffer, before in self._buffers:
            buffer.copy_(before)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Take the gradient that ``perturb`` saw into the average, when the second pass is done."""
        for average, following in self._next:
            average.copy_(following)
        self._next, self._buffers = [], []

    def state_dict(self) -> dict[str, Any]:
        """State of F-SAM; empty for SAM."""
        return {"average": self._average, "started": self._started} if self._sigma else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state_dict``; nothing from a run without F-SAM, or for SAM, which has no average."""
        if not (state and self._sigma):
            return
        for own, saved in zip(self._average, state["average"], strict=True):
            own.copy_(saved)
        self._started.copy_(state["started"])
