"""Write report.html of an evaluated run: ``python -m tal_fast.html_report RUN``."""

from tal_fast.evaluation.html.command import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
