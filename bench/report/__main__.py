"""Tables and plots of the committed results: ``python -m bench.report``.

Reads bench/results/cpu/*.json, kernels/*.json, and gpu.json where there is one; writes the tables of README.md and
docs/performance.md between their markers, and docs/figures/*.svg. The same results always give the same text.
``--check`` writes nothing and exits with 1 where a table is not what the results say.
"""

from __future__ import annotations

import argparse
import json

from bench.report.figures import FIGURES, plot
from bench.report.pages import PAGES, fill_in, update_pages
from bench.report.results import RESULTS, ROOT, Results


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is out of step")
    args = parser.parse_args()
    gpu_file = RESULTS / "gpu.json"
    try:
        cpu = Results.read(RESULTS / "cpu")
    except ValueError as error:
        parser.error(str(error))
    gpu = json.loads(gpu_file.read_text()) if gpu_file.exists() else None
    stale = update_pages(
        PAGES, lambda text: fill_in(text, cpu, gpu), check=args.check, command="python -m bench.report"
    )
    if args.check:
        return
    plot(cpu, FIGURES)
    print(f"wrote {', '.join(stale) or 'no page anew'} and {FIGURES.relative_to(ROOT)}/*.svg")


if __name__ == "__main__":
    main()
