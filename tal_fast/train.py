"""Train a classifier: ``python -m tal_fast.train --config digits-tal --output runs/digits``."""

from tal_fast.training.command import main

if __name__ == "__main__":
    from tal_fast.utils.process import run_and_exit

    run_and_exit(main)
