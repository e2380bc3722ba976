"""``python -m tal_fast.evaluate``."""

import sys

from tal_fast.evaluate.command import main

sys.exit(main())
