"""WebDataset shards from a folder of images: ``python -m tal_fast.pack FOLDER OUT``."""

from tal_fast.data.pack import main

if __name__ == "__main__":
    from tal_fast.utils.process import run_and_exit

    run_and_exit(main)
