"""Console command: ``tal-fast train ...`` is ``python -m tal_fast.train ...``."""

import sys
from importlib import import_module

from tal_fast.utils.process import run_and_exit

COMMANDS = ("train", "evaluate", "compare", "calibrate", "experiment", "check-data", "html-report", "info")


def main() -> None:
    """Run the command named by the first argument with the remaining ones."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            f"usage: tal-fast COMMAND ...\n\ncommands: {', '.join(COMMANDS)}\n\ntal-fast COMMAND --help lists its options"
        )
        return
    if name.replace("_", "-") not in COMMANDS:
        sys.exit(f"error: no command {name!r}; there are {', '.join(COMMANDS)}")
    del sys.argv[1]
    run_and_exit(import_module(f"tal_fast.{name.replace('-', '_')}").main)


if __name__ == "__main__":
    main()
