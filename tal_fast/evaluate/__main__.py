"""``python -m tal_fast.evaluate``."""

from tal_fast.evaluate.command import main
from tal_fast.process import run_and_exit

run_and_exit(main)
