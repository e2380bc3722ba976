"""Train, evaluate and compare methods: ``python -m tal_fast.experiment FILE.yaml --output DIR``."""

from tal_fast.experiments.command import main

if __name__ == "__main__":
    from tal_fast.utils.process import run_and_exit

    run_and_exit(main)
