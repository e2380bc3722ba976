"""Check that every image of a folder decodes: ``python -m tal_fast.check_data FOLDER --out list.txt``."""

from tal_fast.data.check import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
