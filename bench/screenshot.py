"""Picture of a report page for the documentation: ``python -m bench.screenshot runs/digits-tal/report.html``.

Needs Chromium. Writes the top of the page to docs/figures/report.png.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from bench.report.figures import FIGURES
from tests.helpers.chromium import chromium

WIDTH, HEIGHT = 1280, 1100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html of an evaluation")
    parser.add_argument("--output", type=Path, default=FIGURES / "report.png")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        browser.open(args.page, WIDTH, HEIGHT)
        browser.picture(args.output, full=False)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
