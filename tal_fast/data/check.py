"""``python -m tal_fast.check_data FOLDER --out list.txt``: decode every image, name the bad ones, list the others.

The list is what training takes as ``data.file_list``: UTF-8 text, one path a line relative to FOLDER, sorted, lines
that start with ``#`` left out; an image's class is its folder, ``train/CLASS/...`` or ``val/CLASS/...``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from tal_fast.data.image_folder import EXTENSIONS, odd_pixels, why
from tal_fast.utils.io import replacing
from tal_fast.utils.process import program_name

PROBLEMS = {
    "empty": "of 0 bytes",
    "not an image": "no image format fits the content, whatever the ending says",
    "truncated": "the end is missing",
    "damaged": "does not decode, or cannot be read",
    "odd pixels": "16 bits or floating point, or a format that only one loader reads",
    "odd name": "a line break in the path, which a list cannot hold",
}
"""Kinds of files that training cannot use."""

NOTES = {
    "CMYK": "converted to RGB; usable",
    "EXIF-rotated": "read as stored, not as EXIF would turn them; usable",
    "ending": "the ending names another format than the content has; usable",
    "passed over": "an image, but its ending is none that training reads",
}
"""Kinds that are worth knowing and no problem."""

_CHUNK = 16
"""Files handed to a process at a time: many enough to be cheap, few enough for the bar to move."""


@dataclass(frozen=True)
class Finding:
    """What there is to say about a file.

    Attributes:
        path: relative to the folder.
        kind: a key of ``PROBLEMS`` or ``NOTES``.
        detail: in a few words.
    """

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """All files of a folder.

    Attributes:
        usable: paths, sorted, relative to the folder, of what training can read.
        findings: in the order of their paths.
        others: number of files that are no images and do not claim to be.
    """

    usable: list[str]
    findings: list[Finding]
    others: int

    @property
    def problems(self) -> list[Finding]:
        """The findings that keep a file from being used."""
        return [f for f in self.findings if f.kind in PROBLEMS]


def check_folder(root: Path, workers: int, show_bar: bool | None = None) -> Report:
    """Decode all images under a folder, at any depth; hidden files and folders are passed over.

    Args:
        root: of any layout.
        workers: processes; with 1, this one.
        show_bar: None: on a terminal.

    Raises:
        ValueError: no such folder, no image in it, or a process that was killed.
    """
    from tqdm import tqdm

    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name one with images")
    paths = sorted(_walk(str(root), ""))
    usable, findings, others = [], [], 0
    bar = tqdm(
        total=len(paths), desc=f"checking {root}", unit=" files", disable=None if show_bar is None else not show_bar
    )
    try:
        with bar:
            for path, found in zip(paths, _check_all(str(root), paths, workers), strict=True):
                bar.update()
                if found is None:
                    others += 1
                    continue
                findings += found
                if not any(f.kind in PROBLEMS or f.kind == "passed over" for f in found):
                    usable.append(path)
    except BrokenProcessPool:
        raise ValueError(
            "a checking process was killed, perhaps for want of memory; run it again with fewer --workers"
        ) from None
    if not usable and not findings:
        raise ValueError(f"{root} holds no images ({', '.join(EXTENSIONS)})")
    return Report(usable, findings, others)


def check_file(root: str, path: str) -> list[Finding] | None:
    """What there is to say about one file; None: it neither is an image nor claims to be one."""
    full = os.path.join(root, path)
    claims = path.lower().endswith(EXTENSIONS)
    found = []
    try:
        if os.path.getsize(full) == 0:
            return [Finding(path, "empty", PROBLEMS["empty"])] if claims else None
        with Image.open(full) as image:
            if not claims:
                return [Finding(path, "passed over", f"{image.format}, add an ending such as {EXTENSIONS[0]}")]
            image.load()
            problem = odd_pixels(image)
            if problem is not None:
                return [Finding(path, "odd pixels", problem)]
            if image.mode == "CMYK":
                found.append(Finding(path, "CMYK", NOTES["CMYK"]))
            orientation = image.getexif().get(Tag.Orientation, 1)
            if orientation in range(2, 9):
                found.append(Finding(path, "EXIF-rotated", f"orientation {orientation}"))
            expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
            if expected is not None and expected != image.format:
                found.append(Finding(path, "ending", f"content is {image.format}"))
    except UnidentifiedImageError:
        return [Finding(path, "not an image", "no image format fits it")] if claims else None
    except Exception as error:  # a decoder may fail in any way
        if not claims:
            return None
        reason = why(error, full)
        return [Finding(path, "truncated" if "truncated" in reason.lower() else "damaged", reason)]
    if "\n" in path or "\r" in path:
        found.append(Finding(path, "odd name", PROBLEMS["odd name"]))
    return found


def write_list(path: Path, usable: Sequence[str]) -> None:
    """Write the paths as ``data.file_list`` takes them, whole or not at all."""
    lines = [
        "# usable images, by python -m tal_fast.check_data",
        *(f"./{p}" if p.startswith("#") else p for p in usable),
    ]
    text = "".join(line + "\n" for line in lines).encode("utf-8", errors="surrogateescape")
    with replacing(path) as temporary:
        temporary.write_bytes(text)


def _check_all(root: str, paths: Sequence[str], workers: int) -> Iterator[list[Finding] | None]:
    roots: Iterable[str] = [root] * len(paths)
    if workers == 1:
        yield from map(check_file, roots, paths)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(check_file, roots, paths, chunksize=_CHUNK)


def _walk(root: str, below: str) -> Iterator[str]:
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = os.path.join(below, entry.name)
            if entry.is_dir():
                yield from _walk(root, path)
            else:
                yield path


def _printable(path: str) -> str:
    """A path that any terminal takes, though it holds line breaks or bytes that are no UTF-8."""
    return (
        path.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace").replace("\n", "\\n")
    )


def _print_report(report: Report, root: Path) -> None:
    for finding in report.findings:
        print(f"{finding.kind}: {_printable(os.path.join(root, finding.path))} ({finding.detail})")
    counts = Counter(f.kind for f in report.findings)
    others = f", {report.others:,} other files" if report.others else ""
    print(f"{len(report.usable):,} usable images{others}")
    for kinds, title in ((PROBLEMS, "not usable"), (NOTES, "worth knowing")):
        for kind, meaning in kinds.items():
            if counts[kind]:
                print(f"  {title}: {counts[kind]:,} {kind} ({meaning})")


def main(argv: Sequence[str] | None = None) -> int:
    """0: all images are usable; 1: some are not; 2: a mistake of the user's."""
    parser = argparse.ArgumentParser(
        prog=program_name("check-data"),
        description="Decode every image under a folder of any layout, name those that training cannot use, and list "
        "the others. Exit code: 0 all are usable, 1 some are not, 2 a mistake.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="what data.root names, or any folder of images")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the usable images, for --data.file_list FILE")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (%(default)s)")
    options = parser.parse_args(argv)
    try:
        if options.workers < 1:
            raise ValueError(f"--workers is {options.workers} but must be at least 1")
        report = check_folder(options.folder, options.workers)
        _print_report(report, options.folder)
        if options.out is not None:
            write_list(options.out, report.usable)
            print(f"wrote {options.out}; train with --data.root {options.folder} --data.file_list {options.out}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if report.problems else 0
