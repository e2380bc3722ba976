"""WebDataset shards from a folder of images: ``python -m tal_fast.pack FOLDER OUT``."""

from tal_fast.data.pack import main
from tal_fast.utils.process import run_and_exit

if __name__ == "__main__":
    run_and_exit(main)
