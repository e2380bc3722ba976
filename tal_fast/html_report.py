"""Write report.html of an evaluated run: ``python -m tal_fast.html_report RUN``."""

import sys

from tal_fast.evaluation.html.command import main

if __name__ == "__main__":
    sys.exit(main())
