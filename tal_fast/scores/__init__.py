"""Confidence scores of logits and features; higher means more confident."""

from tal_fast.scores.logits import SCORES, cosine, doctor, energy, logit_scores, max_logit, msp, neg_entropy

__all__ = ["SCORES", "cosine", "doctor", "energy", "logit_scores", "max_logit", "msp", "neg_entropy"]
