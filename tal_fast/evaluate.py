"""Evaluate failure detection: ``python -m tal_fast.evaluate --run runs/digits``."""

from tal_fast.evaluation.command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
