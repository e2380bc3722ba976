"""Compare evaluated runs: ``python -m tal_fast.compare runs/digits-ce runs/digits-tal``."""

from tal_fast.evaluation.compare_command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
