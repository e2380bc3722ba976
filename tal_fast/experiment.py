"""Train, evaluate and compare methods: ``python -m tal_fast.experiment FILE.yaml --output DIR``."""

from tal_fast.experiments.command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
