"""Choose a confidence threshold: ``python -m tal_fast.calibrate --run runs/digits --risk 0.02``."""

import sys

from tal_fast.evaluation.selective import main

if __name__ == "__main__":
    sys.exit(main())
