"""Classify image files: ``python -m tal_fast.predict --model runs/digits photos/ --out predictions.csv``."""

from tal_fast.evaluation.predict_command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
