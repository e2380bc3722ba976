"""Golden data, random batches and steps shared by the tests of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tal_fast.loss import functional, reference
from tal_fast.loss.options import LossOptions
from tal_fast.loss.reference import TALStats
from tests.helpers.backends import device_of

DATA = Path(__file__).parents[1] / "data"
_LOSS = np.load(DATA / "loss_cases.npz", allow_pickle=False)
CASES = [str(name) for name in _LOSS["cases"]]


def golden(case: str) -> dict[str, Tensor]:
    """Golden case: inputs, queue before and after, and for each variant the results in float64."""
    prefix = case + "/"
    return {key[len(prefix) :]: torch.from_numpy(_LOSS[key]) for key in _LOSS.files if key.startswith(prefix)}


def trace() -> dict[str, Tensor]:
    """Golden steps: 40 of them over a queue of 50."""
    with np.load(DATA / "trace.npz", allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def options(case: dict[str, Tensor], variant: str) -> dict[str, Any]:
    """Keyword arguments of the loss for a golden case, all of which were made with the released code's threshold."""
    temperatures = {key: float(case[key]) for key in ("t_min", "t_max", "t_wrong")}
    return {"variant": variant, "confidence_threshold": 0.0, **temperatures}


def relative(x: Tensor, truth: Tensor) -> float:
    """‖x − truth‖ / ‖truth‖, or ‖x‖ where the truth is zero."""
    x, truth = x.detach().double(), truth.double()
    return float((x - truth).norm() / (truth.norm() if truth.norm() > 0 else 1))


def random_batch(rows: int, classes: int, width: int = 64, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, features and labels (float32), about 60% of them correct."""
    logits = torch.randn(rows, classes) * scale
    features = torch.rand(rows, width) * (0.5 + torch.rand(rows, 1))
    labels = torch.where(torch.rand(rows) < 0.6, logits.argmax(1), torch.randint(classes, (rows,)))
    return logits, features, labels


def random_queue(entries: int) -> tuple[Tensor, Tensor]:
    return 0.4 + 0.2 * torch.rand(entries), 0.2 + 0.1 * torch.rand(entries)


def exact(logits: Tensor, labels: Tensor, typicalness: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64 for a given typicalness, from the definition's formulas one by one.

    Row i of the gradient is that of loss i, if losses are not reduced. It is independent of
    ``tal_fast.loss.reference``: log-sum-exps and the closed-form gradient instead of autograd.
    """
    variant, smoothing = kwargs.get("variant", "paper"), kwargs.get("label_smoothing", 0.0)
    t_min, t_max, t_wrong = (kwargs.get(k, d) for k, d in (("t_min", 10.0), ("t_max", 100.0), ("t_wrong", 20.0)))
    valid = labels != kwargs.get("ignore_index", -100)
    reduction = kwargs.get("reduction", "mean")
    if not valid.any():
        rows = len(logits) if reduction == "none" else ()
        return logits.new_zeros(rows, dtype=torch.float64), torch.zeros_like(logits, dtype=torch.float64)
    z, tau, y = logits.detach().double(), typicalness.double(), labels.clamp(min=0)
    correct = z.argmax(1) == y
    w = torch.where(correct, tau, 1.0)
    t = t_min + (1 - tau) * (t_max - t_min)
    t = t if t_wrong is None else torch.where(correct, t, t_wrong)
    r = z.norm(dim=1, keepdim=True)
    n = r + reference.NORM_EPS
    u = z / n
    class_weight = kwargs.get("class_weight")
    c = torch.ones(z.shape[1], dtype=torch.float64) if class_weight is None else class_weight.double()
    e = (1 - smoothing) * c * torch.nn.functional.one_hot(y, z.shape[1]) + smoothing * c / z.shape[1]
    mass = e.sum(1, keepdim=True)  # 1 without class weights
    scaled = t[:, None] * u
    l_dir = mass[:, 0] * scaled.logsumexp(1) - (e * scaled).sum(1)
    l_ce = mass[:, 0] * z.logsumexp(1) - (e * z).sum(1)
    p_e, q_e = mass * scaled.softmax(1) - e, mass * z.softmax(1) - e
    along = torch.where(r > 0, (n / r) * u * (u * p_e).sum(1, keepdim=True), 0.0)
    g_dir = (t[:, None] / n) * (p_e - along)
    if variant == "released":
        w = torch.full_like(w, w[valid].mean())
    divisor = c[y[valid]].sum() if reduction == "mean" else 1.0
    loss = torch.where(valid, w * l_dir + (1 - w) * l_ce, 0.0)
    loss = loss if reduction == "none" else loss.sum() / divisor
    grad = (w[:, None] * g_dir + (1 - w[:, None]) * q_e) / divisor
    return loss, torch.where(valid[:, None], grad, 0.0)


def run_step(
    backend: str,
    logits: Tensor,
    features: Tensor,
    labels: Tensor,
    queue: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, TALStats]:
    """Loss, gradient and statistics of one step of a backend, on the CPU; against a random queue by default."""
    device = device_of(backend)
    if kwargs.get("class_weight") is not None:
        kwargs["class_weight"] = kwargs["class_weight"].to(device)
    queue = random_queue(100) if queue is None else queue
    leaf = logits.detach().to(device).requires_grad_()
    loss, stats = functional.tal_loss(
        leaf, features.to(device), labels.to(device), *(q.to(device) for q in queue), backend=backend, **kwargs
    )
    (grad,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach().cpu(), grad.cpu(), TALStats(*(s.cpu() for s in stats))


def reference_loss(
    logits: Tensor,
    labels: Tensor,
    distance: Tensor,
    *,
    warmup: bool = False,
    summary: Tensor | None = None,
    class_weight: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, TALStats]:
    """``reference.tal_loss`` with its options as keyword arguments."""
    given: dict[str, Any] = {"warmup": warmup, "summary": summary, "class_weight": class_weight}
    return reference.tal_loss(logits, labels, distance, LossOptions(**kwargs), **given)
