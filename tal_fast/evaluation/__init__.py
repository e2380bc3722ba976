"""Evaluation of failure detection: how well confidence separates correct from incorrect predictions."""
