"""Further confidence scores of logits: margin, log-gap, GEN, and the MaxLogit-pNorm, whose p has to be chosen.

``margin``, ``log_gap`` and ``gen`` are among ``SCORES``, see ``tal_fast.scores.logits``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tal_fast.scores.logits import SCORES, Rows, _log_probabilities, _row_sum, logit_score

if TYPE_CHECKING:
    from torch import Tensor

GEN_CLASSES, GEN_ROOT = 100, 10
"""Number of largest probabilities that GEN takes, and 1/γ; ONNX would round 0.1 to float32."""


@logit_score
def margin(rows: Rows) -> Tensor:
    """Largest logit minus the second largest; +inf for a single class."""
    return rows.top - rows.z.scatter(1, rows.z.argmax(1, keepdim=True), -math.inf).amax(1)


@logit_score
def log_gap(rows: Rows) -> Tensor:
    """Log-odds of the predicted class, log(p₁ / (1 − p₁)): MSP's order without the ties where p₁ rounds to 1.

    −logsumexp of z_k − z₁ over the other classes; +inf for a single class.
    """
    return rows.log_odds[1].squeeze(1)


@logit_score
def gen(rows: Rows) -> Tensor:
    """GEN, −Σ p^γ (1 − p)^γ over the 100 largest probabilities, γ = 0.1 (Liu et al., CVPR 2023).

    1 − p₁ is summed over the other classes, so that it does not saturate.
    """
    _, log_p, log_rest, others = _log_probabilities(rows)
    rest = others.topk(min(GEN_CLASSES - 1, others.shape[1]), 1).values
    terms = ((rest + (-rest.exp()).log1p()) / GEN_ROOT).exp()
    return -_row_sum(terms) - ((log_p + log_rest) / GEN_ROOT).exp().squeeze(1)


def max_logit_pnorm(p: int) -> Callable[[Any], Any]:
    """Centred MaxLogit-pNorm, max x / max(‖x‖_p, 1e-12) with x = z − mean z (Cattelan and Silva, UAI 2024).

    For p = 0 the norm is the number of nonzeros, so that the order is the centred maximum logit's.
    """

    @logit_score
    def score(rows: Rows) -> Tensor:
        z = rows.z
        x = z - _row_sum(z)[:, None] / z.shape[1]
        if p == 0:
            return x.amax(1) / (x != 0).sum(1).clamp(min=1e-12)
        size = x.abs().amax(1).clamp(min=1e-300)  # powers of x / size neither overflow nor vanish all
        norm = size * _row_sum((x.abs() / size[:, None]) ** p) ** (1 / p)
        return x.amax(1) / norm.clamp(min=1e-12)

    return score


SCORES.update({function.__name__: function for function in (margin, log_gap, gen)})
