"""Reports side by side, best of each column marked: ``python -m tal_fast.compare runs/digits-ce runs/digits-tal``.

Each run is judged by its method's own score (TAL by cosine, CE by the maximum softmax probability) unless ``--score``
says otherwise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tal_fast.metrics import HIGHER_IS_BETTER, METRICS
from tal_fast.report import SETTING_TITLES, TITLES, UNITS, Report, format_table, format_value, mix_and_seed, read_report

DEFAULT_METRICS = ("aurc", "auroc", "fpr95")


def check_comparable(reports: Sequence[Report], names: Sequence[str]) -> None:
    """Refuse to set numbers side by side that mean different things.

    Raises:
        ValueError: the reports differ in convention, mix, its seed, OOD sets or number of samples.
    """
    first = reports[0]
    for report, name in zip(reports[1:], names[1:], strict=True):
        for what in ("convention", "mix", "set of OOD data"):
            one, other = (_says(r, what) for r in (first, report))
            if one != other:
                raise ValueError(
                    f"{names[0]} and {name} cannot be compared: {what} is {one} in one and {other} in the other; "
                    "evaluate them alike"
                )
        sizes = [(r["counts"]["id"], r["counts"]["ood"]) for r in (first, report)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{names[0]} and {name} cannot be compared: they were evaluated on {_sizes(*sizes[0])} and on "
                f"{_sizes(*sizes[1])}"
            )


def _says(report: Report, what: str) -> str:
    if what == "mix":
        return mix_and_seed(report)
    return report["convention"] if what == "convention" else ", ".join(report["ood_names"]) or "none"


def _sizes(n_id: int, ood: dict[str, int]) -> str:
    return ", ".join([f"{n_id} ID", *(f"{n} {name}" for name, n in ood.items())]) + " samples"


def judged_by(report: Report, name: str, score: str | None = None) -> str:
    """The score a report is judged by: the given one, the run's own, or the only one there is.

    Raises:
        ValueError: the report does not have it, or leaves open which it is.
    """
    there = list(report["settings"]["old_fd"])
    chosen = score or report.get("score") or (there[0] if len(there) == 1 else None)
    if chosen is None:
        raise ValueError(f"{name} names no score of its own; choose one with --score: {', '.join(there)}")
    if chosen not in there:
        raise ValueError(f"{name} has no score {chosen!r}; it has {', '.join(there)}")
    return chosen


def comparison(
    reports: Sequence[Report],
    names: Sequence[str],
    *,
    metrics: Sequence[str] = DEFAULT_METRICS,
    score: str | None = None,
    units: str = "natural",
) -> str:
    """A table with a row a report and a column a metric of each setting, the best of each column marked with ``*``.

    Args:
        reports: from ``tal_fast.report.read_report``.
        names: of the rows.
        metrics: keys of ``tal_fast.metrics.METRICS``.
        score: judge all by this one; None: each by its own.
        units: ``natural`` or ``paper``.

    Raises:
        ValueError: see ``check_comparable`` and ``judged_by``.
    """
    check_comparable(reports, names)
    settings = [key for key in SETTING_TITLES if all(key in report["settings"] for report in reports)]
    columns = [(key, metric) for key in settings for metric in metrics]
    chosen = [judged_by(report, name, score) for report, name in zip(reports, names, strict=True)]
    accuracy = [math.nan if r["id_accuracy"] is None else r["id_accuracy"] for r in reports]
    cells = [_marked(accuracy, [f"{a:.2%}" for a in accuracy], True)]
    for key, metric in columns:
        values = [r["settings"][key][s][metric] for r, s in zip(reports, chosen, strict=True)]
        cells.append(_marked(values, [format_value(metric, v, units) for v in values], HIGHER_IS_BETTER[metric]))
    header = [
        "\nrun",
        "\nscore",
        "\naccuracy ",
        *(f"{SETTING_TITLES[key]} \n{TITLES[metric]} " for key, metric in columns),
    ]
    rows = [[name, s, *row] for name, s, row in zip(names, chosen, zip(*cells, strict=True), strict=True)]
    return format_table(header, rows)


def _marked(values: Sequence[float], texts: Sequence[str], higher: bool) -> list[str]:
    """Texts with ``*`` after the best; a space after the others keeps the digits in line."""
    known = [v for v in values if not math.isnan(v)]
    best = (max if higher else min)(known) if known else math.nan
    return [text + ("*" if value == best else " ") for text, value in zip(texts, values, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tal_fast.compare", description="Set failure-detection reports side by side."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or a report.json")
    parser.add_argument(
        "--metrics", nargs="+", choices=METRICS, default=list(DEFAULT_METRICS), metavar="METRIC",
        help=f"columns of each setting: {', '.join(METRICS)} ({' '.join(DEFAULT_METRICS)})",
    )  # fmt: skip
    parser.add_argument("--score", help="judge every run by this score (each by its method's own)")
    parser.add_argument("--units", choices=UNITS, default="natural", help="of the table (%(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0, or 2 for bad input, said in one sentence."""
    args = _parser().parse_args(argv)
    names = [Path(run).name if Path(run).is_dir() else str(run) for run in args.runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    try:
        reports = [read_report(run) for run in args.runs]
        table = comparison(reports, names, metrics=args.metrics, score=args.score, units=args.units)
    except ValueError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    first = reports[0]
    scale = "natural units" if args.units == "natural" else "AURC times 1000, the rest in percent"
    print(f"convention {first['convention']}; ID:OOD mix {mix_and_seed(first)}; {scale}; * best")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
