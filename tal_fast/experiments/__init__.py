"""Comparing methods under one protocol with one file: ``python -m tal_fast.experiment FILE.yaml --output DIR``."""
