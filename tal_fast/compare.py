"""Compare evaluated runs: ``python -m tal_fast.compare runs/digits-ce runs/digits-tal``."""

import sys

from tal_fast.evaluation.compare_command import main

if __name__ == "__main__":
    sys.exit(main())
