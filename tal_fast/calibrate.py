"""Choose a confidence threshold: ``python -m tal_fast.calibrate --run runs/digits --risk 0.02``."""

from typing import Any

from tal_fast.evaluation.calibrate_command import main
from tal_fast.utils.process import run_and_exit


def __getattr__(name: str) -> Any:
    # The class whose state dict selective.pt is, by its documented name; imported lazily, as it needs PyTorch.
    if name == "SelectiveClassifier":
        from tal_fast.evaluation.export import SelectiveClassifier

        return SelectiveClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    run_and_exit(main)
