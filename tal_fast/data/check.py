"""Check of image files: ``python -m tal_fast.check_data FOLDER --out list.txt``.

The list is for ``data.file_list``: UTF-8 text with one path per line relative to FOLDER, sorted; lines that start with
``#`` are skipped.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from tal_fast.data.image_folder import (
    ABOVE,
    EXTENSIONS,
    FORMATS,
    counted,
    ending,
    error_summary,
    unsupported_pixels,
    walk,
)
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.io import replacing
from tal_fast.utils.process import program_name, report_mistake

PROBLEMS = {
    "empty": "file of 0 bytes",
    "not an image": "no image format fits the content, whatever the ending",
    "truncated": "the end is missing",
    "damaged": "does not decode, or cannot be read",
    "unsupported pixels": "16 bits or floating point, or a format that only one loader reads",
    "unsupported name": "a line break in the path, which a list cannot hold",
}
"""Kinds of files that training cannot use."""

NOTES = {
    "CMYK": "converted to RGB; usable",
    "EXIF-rotated": "read as stored, without the rotation, unless data.exif_rotation is on; usable",
    "ending": "the content has another format than the ending says; usable",
    "link": "to a folder above it; not followed",
    "ignored": "an image with an ending that training does not read",
}
"""Kinds of files that are no problem but worth knowing."""

_CHUNK = 16
"""Files per task of a process: enough to be cheap, few enough for the progress bar to move."""


@dataclass(frozen=True)
class Finding:
    """Finding about a file, whose path is relative to the folder; ``kind`` is a key of ``PROBLEMS`` or ``NOTES``."""

    path: str
    kind: str
    detail: str


@dataclass(frozen=True)
class Report:
    """Result for a folder: sorted relative paths of usable images, findings by path, and other files by ending."""

    usable: list[str]
    findings: list[Finding]
    others: Counter[str]

    @property
    def problems(self) -> list[Finding]:
        """Findings about files that training cannot use."""
        return [f for f in self.findings if f.kind in PROBLEMS]


def check_folder(root: Path, workers: int, show_bar: bool | None = None) -> Report:
    """Decode all images under a folder, at any depth, without hidden files and folders.

    Args:
        root: folder of any layout.
        workers: number of processes; 1 uses this one.
        show_bar: whether to show a progress bar; by default on a terminal.

    Raises:
        ValueError: the folder is missing or has no images, or a process was killed.
    """
    from tqdm import tqdm

    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name one with images")
    usable, findings, paths, others = [], [], [], Counter[str]()
    for path, _, problem, is_folder in walk(root):
        name = os.path.relpath(path, root)
        if not problem:
            paths.append(name)
        elif is_folder or name.lower().endswith(EXTENSIONS):
            findings.append(Finding(name, "link" if problem == ABOVE else "damaged", problem))
        else:
            others[ending(name)] += 1
    paths.sort()
    bar = tqdm(
        total=len(paths), desc=f"checking {root}", unit=" files", disable=None if show_bar is None else not show_bar
    )
    try:
        with bar:
            for path, found in zip(paths, _check_all(str(root), paths, workers), strict=True):
                bar.update()
                if found is None:
                    others[ending(path)] += 1
                    continue
                findings += found
                if not any(f.kind in PROBLEMS or f.kind == "ignored" for f in found):
                    usable.append(path)
    except BrokenProcessPool:
        raise ValueError(
            "a process was killed, perhaps because memory ran out; run the check again with fewer --workers"
        ) from None
    if not usable and not findings:
        raise ValueError(f"{root} holds no images ({', '.join(EXTENSIONS)})")
    return Report(usable, sorted(findings, key=lambda f: f.path), others)


def check_file(root: str, path: str) -> list[Finding] | None:
    """Findings about one file; None if it is no image and has no image's ending."""
    full = os.path.join(root, path)
    has_ending = path.lower().endswith(EXTENSIONS)
    found = []
    try:
        if os.path.getsize(full) == 0:
            return [Finding(path, "empty", PROBLEMS["empty"])] if has_ending else None
        with Image.open(full) as image:
            if not has_ending:
                remedy = f"add an ending such as {EXTENSIONS[0]}" if image.format in FORMATS else "convert it to PNG"
                return [Finding(path, "ignored", f"{image.format}, {remedy}")]
            problem = unsupported_pixels(image)
            image.load()
            if problem is not None:
                return [Finding(path, "unsupported pixels", problem)]
            if image.mode == "CMYK":
                found.append(Finding(path, "CMYK", NOTES["CMYK"]))
            orientation = image.getexif().get(Tag.Orientation, 1)
            if orientation in range(2, 9):
                found.append(Finding(path, "EXIF-rotated", f"orientation {orientation}"))
            expected = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
            if expected not in (None, image.format) and (expected, image.format) != ("JPEG", "MPO"):
                found.append(Finding(path, "ending", f"content is {image.format}"))
    except UnidentifiedImageError:
        return [Finding(path, "not an image", "no image format fits it")] if has_ending else None
    except Exception as error:  # decoders raise many types of errors
        if not has_ending:
            return None
        reason = error_summary(error, full)
        return [Finding(path, "truncated" if "truncated" in reason.lower() else "damaged", reason)]
    if "\n" in path or "\r" in path:
        found.append(Finding(path, "unsupported name", PROBLEMS["unsupported name"]))
    return found


def write_list(path: Path, usable: Sequence[str]) -> None:
    """Write the list for ``data.file_list`` atomically."""
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


def _printable(path: str) -> str:
    """Path with line breaks and bytes that are not UTF-8 escaped."""
    text = path.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
    return text.replace("\n", "\\n")


def _print_report(report: Report, root: Path) -> None:
    for finding in report.findings:
        print(f"{finding.kind}: {_printable(os.path.join(root, finding.path))} ({finding.detail})")
    counts = Counter(f.kind for f in report.findings)
    print(f"{len(report.usable):,} usable images" + (f"; {counted(report.others)}" if report.others else ""))
    for kinds, title in ((PROBLEMS, "not usable"), (NOTES, "worth knowing")):
        for kind, meaning in kinds.items():
            if counts[kind]:
                print(f"  {title}: {counts[kind]:,} {kind} ({meaning})")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=program_name("check-data"),
        description="Decode every image under a folder, name those that training cannot use, and list the others.",
        epilog="Exit code: 0 if all images are usable, 1 if some are not, 2 for bad input.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Folder of images of any layout.")
    parser.add_argument("--out", type=Path, metavar="FILE", help="List of the usable images, for --data.file_list.")
    parser.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N",
        help="Number of processes. Default: %(default)s.",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0 if all images are usable, 1 if some are not, 2 for bad input."""
    options = _parser().parse_args(argv)
    try:
        report = check_folder(options.folder, options.workers)
        _print_report(report, options.folder)
        if options.out is not None:
            write_list(options.out, report.usable)
            print(f"wrote {options.out}; train with --data.root {options.folder} --data.file_list {options.out}")
    except (ValueError, OSError) as error:
        return report_mistake(error)
    return 1 if report.problems else 0
