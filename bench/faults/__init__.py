"""Faults injected into training and evaluation: ``python -m bench.faults``; docs/reliability.md lists the outcomes."""
