"""Confidence scores of logits and features; higher means more confident."""
# ruff: noqa: I001

from tal_fast.scores.logits import SCORES, cosine, doctor, energy, logit_scores, max_logit, msp, neg_entropy
from tal_fast.scores.logits import gen, log_gap, margin, max_logit_pnorm

__all__ = [
    "SCORES", "cosine", "doctor", "energy", "gen", "log_gap", "logit_scores", "margin", "max_logit", "max_logit_pnorm",
    "msp", "neg_entropy",
]  # fmt: skip
