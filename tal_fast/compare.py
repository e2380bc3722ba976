"""Compare evaluated runs: ``python -m tal_fast.compare runs/digits-ce runs/digits-tal``."""

from tal_fast.evaluation.compare_command import main

if __name__ == "__main__":
    from tal_fast.utils.process import run_and_exit

    run_and_exit(main)
