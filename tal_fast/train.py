"""Train a classifier: ``python -m tal_fast.train --config digits-tal --output runs/digits``."""

from tal_fast.training.command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
