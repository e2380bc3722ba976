"""Comparisons of methods under one protocol: ``python -m tal_fast.experiment FILE.yaml --output DIR``."""
