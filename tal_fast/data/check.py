"""Check of image files: ``python -m tal_fast.check_data FOLDER --out list.txt``.

The list is for ``data.file_list``: UTF-8 text with one path per line relative to FOLDER, sorted; lines that start with
``#`` are skipped.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from tal_fast.data.headers import EXTENSIONS, FORMATS, error_summary, unsupported_pixels
from tal_fast.data.packed import read_extent
from tal_fast.data.sources import PACKED, all_images, packed_source
from tal_fast.data.walk import ABOVE, counted, ending, walk
from tal_fast.utils.arguments import ArgumentParser, at_least
from tal_fast.utils.io import replacing
from tal_fast.utils.logs import printable
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

Place = tuple[str, Any]
"""Image's path in the list, and its file, or file, offset and size."""

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


def check_folder(root: str | Path, workers: int) -> Report:
    """Decode all images of a folder of any layout, at any depth, without hidden files and folders, or of a packed set.

    Args:
        root: folder; or ``webdataset:WHERE`` or ``huggingface:WHERE``.
        workers: number of processes; 1 uses this one.

    Raises:
        ValueError: the folder is missing or has no images, or a process was killed.
    """
    from tqdm import tqdm

    findings: list[Finding] = []
    others = Counter[str]()
    source = packed_source(str(root))
    if source is None:
        images = _find(Path(root), findings, others)
    else:
        images = [
            (name[len(source.root) + 1 :], (found.containers[number], offset, size))
            for found in all_images(source)
            for name, (number, offset, size) in zip(found.names, found.extents.tolist(), strict=True)
        ]
    usable = []
    checked = zip(images, _check_all(images, workers), strict=True)
    try:
        for (path, _), found in tqdm(checked, f"checking {root}", len(images), unit=" files", disable=None):
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
        raise ValueError(
            f"{root} holds no images ({', '.join(EXTENSIONS)}); .tar shards are webdataset:{root}, parquet and Arrow "
            f"files huggingface:{root}"
        )
    return Report(usable, sorted(findings, key=lambda f: f.path), others)


def _find(root: Path, findings: list[Finding], others: Counter[str]) -> list[Place]:
    """Files of a folder; adds what is known of others without reading them."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; name one with images")
    paths = []
    for path, _, problem, is_folder in walk(root):
        name = os.path.relpath(path, root)
        if not problem:
            paths.append((name, path))
        elif is_folder or name.lower().endswith(EXTENSIONS):
            findings.append(Finding(name, "link" if problem == ABOVE else "damaged", problem))
        else:
            others[ending(name)] += 1
    return sorted(paths)


def check_file(path: str, place: Any) -> list[Finding] | None:
    """Findings about one image at a path, or file, offset and size; None if it is none and has no image's ending."""
    packed = not isinstance(place, str)
    has_ending = packed or path.lower().endswith(EXTENSIONS)
    found = []
    try:
        size = place[2] if packed else os.path.getsize(place)
        if size == 0:
            return [Finding(path, "empty", PROBLEMS["empty"])] if has_ending else None
        with Image.open(io.BytesIO(read_extent(*place)) if packed else place) as image:
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
        reason = error_summary(error, path)
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


def _check_all(images: Sequence[Place], workers: int) -> Iterator[list[Finding] | None]:
    paths, places = [path for path, _ in images], [place for _, place in images]
    if workers == 1:
        yield from map(check_file, paths, places)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(check_file, paths, places, chunksize=_CHUNK)


def _print_report(report: Report, root: str) -> None:
    for finding in report.findings:
        print(f"{finding.kind}: {printable(os.path.join(root, finding.path))} ({finding.detail})")
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
    parser.add_argument(
        "folder", metavar="FOLDER", help="Folder of images of any layout; or webdataset:WHERE or huggingface:WHERE."
    )
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
            kind, _, where = options.folder.partition(":")
            data = f"--data.dataset {kind} --data.root {where}" if kind in PACKED else f"--data.root {options.folder}"
            print(f"wrote {options.out}; train with {data} --data.file_list {options.out}")
    except (ValueError, OSError) as error:
        return report_mistake(error)
    return 1 if report.problems else 0
