"""Check that every image of a folder decodes: ``python -m tal_fast.check_data FOLDER --out list.txt``."""

import sys

from tal_fast.data.check import main

if __name__ == "__main__":
    sys.exit(main())
