"""Train, evaluate and compare methods: ``python -m tal_fast.experiment FILE.yaml --output DIR``."""

import sys

from tal_fast.experiments.command import main

if __name__ == "__main__":
    sys.exit(main())
