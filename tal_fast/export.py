"""Export a run's model with its threshold: ``python -m tal_fast.export --run runs/digits --format onnx``."""

from tal_fast.evaluation.export_command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
