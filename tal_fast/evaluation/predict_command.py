"""Command ``predict``: classes, confidences and abstentions for image files, as CSV, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import itertools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tal_fast.utils.arguments import ArgumentParser, add_pass_options, at_least
from tal_fast.utils.io import check_writable, replacing
from tal_fast.utils.process import program_name, report_mistake

SHIFT_LEVEL = 1e-3
"""Probability, at most, of a warning of a shift where there is none, half of it for each side."""
LISTED = 20
"""Unreadable files listed on the terminal; the output names all."""
PARQUET_ROWS = 10_000

Row = dict[str, Any]


def find_images(sources: Iterable[str]) -> Iterator[str]:
    """Paths of images: files as they are, images of folders at any depth, and of glob patterns; sorted for each source.

    Files of a folder with other endings are counted in a warning. Raises ValueError for a folder or pattern without
    images.
    """
    from tal_fast.data.headers import EXTENSIONS
    from tal_fast.data.walk import ABOVE, ending, report_left_out, walk

    for source in sources:
        if os.path.isdir(source):
            found, left_out = [], Counter[str]()
            for path, _, problem, is_folder in walk(Path(source)):
                if problem == ABOVE:
                    left_out[ABOVE] += 1
                elif is_folder or path.lower().endswith(EXTENSIONS):  # a folder that cannot be read is reported too
                    found.append(os.path.join(source, os.path.relpath(path, os.path.abspath(source))))
                else:
                    left_out[ending(path)] += 1
            found.sort()
            report_left_out(Path(source), left_out)
        elif glob.has_magic(source) and not os.path.exists(source):
            found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        else:
            found = [source]  # a file that is missing is reported with the unreadable ones
        if not found:
            raise ValueError(f"{source} has no images ({', '.join(EXTENSIONS)})")
        yield from found


def shift_warning(about: dict[str, Any], accepted: int, total: int) -> str | None:
    """Sentence if the share accepted is not one that the calibration's images suggest; None if it is.

    The share at calibration lies in its Clopper-Pearson interval but for a probability of ``SHIFT_LEVEL`` / 2. The
    number accepted now is a shift if its tail has less than ``SHIFT_LEVEL`` / 4 for every share of the interval.
    """
    from scipy.stats import binom

    from tal_fast.evaluation.selective import lower_limit, upper_limit

    if (about.get("threshold") is None and "class_thresholds" not in about) or not total:
        return None
    parts = [about, *([about["test"]] if "test" in about else [])]
    kept, samples = (sum(part[name] for part in parts) for name in ("accepted", "samples"))
    low = lower_limit(kept, samples, SHIFT_LEVEL / 4)
    high = float(upper_limit(kept, samples, SHIFT_LEVEL / 4))
    too_few = binom.cdf(accepted, total, low) < SHIFT_LEVEL / 4
    too_many = binom.sf(accepted - 1, total, high) < SHIFT_LEVEL / 4
    if not too_few and not too_many:
        return None
    return (
        f"{accepted / total:.1%} of {total:,} images are accepted, and {low:.1%} to {high:.1%} were at calibration: "
        f"these images are not like the validation images, and the bound of {about['risk']:.2%} does not hold for "
        "them; calibrate on labelled images like these"
    )


@contextlib.contextmanager
def _writer(out: str | None, top_k: int) -> Iterator[Callable[[Row], None]]:
    """Function that writes a row to a file, by its ending, or as CSV to standard output."""
    if out is None:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
        yield _csv_rows(sys.stdout, top_k)
        return
    with replacing(out) as temporary:
        if out.endswith(".parquet"):
            with _parquet_rows(temporary, top_k) as write:
                yield write
            return
        with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            if out.endswith(".csv"):
                yield _csv_rows(file, top_k)
            else:
                yield lambda row: print(json.dumps(row), file=file)


def _flat(row: Row, top_k: int) -> Row:
    """A row with ``class_2``, ``probability_2``, ... in place of ``top``."""
    flat = {name: value for name, value in row.items() if name != "top"}
    top = [*row["top"], *[(None, None)] * (top_k - len(row["top"]))]
    for k, (name, probability) in enumerate(top, 1):
        flat |= {f"class_{k}": name, f"probability_{k}": probability}
    return flat


_NO_ROW: Row = {"path": "", "class": None, "confidence": None, "accepted": None, "top": [], "error": None}


def _csv_rows(file: Any, top_k: int) -> Callable[[Row], None]:
    writer = csv.DictWriter(file, list(_flat(_NO_ROW, top_k)), lineterminator="\n")
    writer.writeheader()
    return lambda row: writer.writerow(_flat(row, top_k))


@contextlib.contextmanager
def _parquet_rows(path: Path, top_k: int) -> Iterator[Callable[[Row], None]]:
    import pyarrow
    from pyarrow import parquet

    types = {"confidence": pyarrow.float64(), "accepted": pyarrow.bool_()}
    schema = pyarrow.schema([
        (name, pyarrow.float64() if name.startswith("probability") else types.get(name, pyarrow.string()))
        for name in _flat(_NO_ROW, top_k)
    ])  # fmt: skip
    rows: list[Row] = []

    def flush() -> None:
        writer.write_table(pyarrow.Table.from_pylist(rows, schema))
        rows.clear()

    def write(row: Row) -> None:
        name = os.fsencode(row["path"]).decode(errors="replace")
        rows.append(_flat({**row, "path": name}, top_k))
        if len(rows) == PARQUET_ROWS:
            flush()

    with parquet.ParquetWriter(path, schema) as writer:
        yield write
        flush()


def _check_output(out: str | None) -> None:
    if out is None:
        return
    if not out.endswith((".csv", ".jsonl", ".parquet")):
        raise ValueError(f"--out is {out!r} but must end with .csv, .jsonl or .parquet")
    if out.endswith(".parquet") and find_spec("pyarrow") is None:
        raise ValueError("Parquet needs pyarrow; install it with pip install pyarrow, or write .csv")
    check_writable(Path(out).parent)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("predict"), description="Classify images, and abstain where the model is not confident.",
        epilog="Exit codes: 0; 1 if a file could not be read; 2 for bad input.",
    )  # fmt: skip
    parser.add_argument(
        "images", nargs="+", metavar="IMAGES",
        help="Files, folders, glob patterns in quotes, or - for paths on standard input, one a line.",
    )  # fmt: skip
    parser.add_argument(
        "--model", required=True, metavar="PATH",
        help="Folder of a run, with the threshold of tal_fast.calibrate if it was calibrated, or an ONNX export.",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE", help="File ending with .csv, .jsonl or .parquet. Default: CSV on standard output."
    )
    parser.add_argument("--top-k", type=at_least(1), default=1, help="Classes listed with probabilities. Default: 1.")
    add_pass_options(parser, images=64)
    parser.add_argument("--workers", type=at_least(1), help="Threads that decode. Default: one for each core.")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 1 if a file could not be read, 2 for bad input."""
    args = _parser().parse_intermixed_args(argv)
    try:
        _check_output(args.out)
        from tal_fast.evaluation.classifier import Classifier

        classifier = Classifier(args.model, device=args.device, batch_size=args.batch_size, workers=args.workers)
        if args.top_k > len(classifier.class_names):
            raise ValueError(f"--top-k is {args.top_k} but the model has {len(classifier.class_names)} classes")
        if "-" in args.images:
            if len(args.images) > 1:
                raise ValueError("- reads the paths from standard input; name no others beside it")
            lines = (os.fsdecode(line).rstrip("\r\n") for line in sys.stdin.buffer)
            paths: Iterable[str] = filter(None, lines)
        else:
            paths = list(find_images(args.images))
        return _predict(classifier, paths, args.out, args.top_k)
    except (ValueError, OSError) as problem:
        return report_mistake(problem)


def _predict(classifier: Any, paths: Iterable[str], out: str | None, top_k: int) -> int:
    from tqdm import tqdm

    if classifier.threshold is None:
        print("warning: the model has no threshold; calibrate it to have images accepted or not", file=sys.stderr)
    done = accepted = unreadable = 0
    total = len(paths) if isinstance(paths, list) else None
    names, images = itertools.tee(paths)
    with _writer(out, top_k) as write, tqdm(total=total, unit=" images", leave=False, disable=None) as bar:
        for prediction in classifier.stream(images, top_k):
            path, bad = next(names), bool(prediction.error)
            write({
                "path": path, "class": None if bad else prediction.class_name,
                "confidence": None if bad else prediction.confidence, "accepted": prediction.accepted,
                "top": prediction.top, "error": prediction.error or None,
            })  # fmt: skip
            done += not bad
            accepted += prediction.accepted is True
            unreadable += bad
            if bad and unreadable <= LISTED:
                tqdm.write(prediction.error, file=sys.stderr)
            bar.update()
    parts = [f"{done:,} images"]
    if classifier.threshold is not None:
        parts += [f"{accepted:,} accepted", f"{done - accepted:,} abstained"]
    if unreadable:
        parts.append(f"{unreadable:,} could not be read (all in the column error)")
    print("; ".join(parts), file=sys.stderr)
    warning = shift_warning(classifier.about, accepted, done)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    return 1 if unreadable else 0
