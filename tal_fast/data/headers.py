"""Headers of image files: format, pixels and size, without decoding."""

from __future__ import annotations

import io
import os

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from tal_fast.config.typed import one_line

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF: tuple[str, ...] = ()
else:
    register_heif_opener()  # makes Pillow read them, upright
    HEIF = (".heic", ".heif", ".hif")

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", *HEIF,
)  # fmt: skip
"""Endings of image files, in upper or lower case; other files are left out, and counted in a warning."""

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "HEIF")
"""Pillow's names of the formats that Pillow and, but for HEIF, DALI read, whatever the ending of the file."""

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
"""Pillow's modes that both loaders convert to the same 8-bit pixels, unlike 16-bit gray or floating point."""


class UnreadableImage(ValueError):
    """Error for a file that is no image or does not decode."""


def size_of(image: Image.Image, upright: bool) -> tuple[int, int]:
    """Height and width of an open image, as stored or turned as its EXIF data say."""
    turned = upright and image.getexif().get(Tag.Orientation, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def image_size(path: str, source: str | io.BytesIO | None = None, upright: bool = False) -> tuple[int, int]:
    """Height and width from the header of an image file, or of its content ``source``, see ``size_of``.

    Raises UnreadableImage if it is no image, cannot be read, or has pixels that the loaders read differently.
    """
    try:
        with Image.open(source or path) as image:
            problem = unsupported_pixels(image)
            if problem is None:
                return size_of(image, upright)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        problem = error_summary(error, path)
    raise unusable(path, problem)


def unusable(path: str, problem: str) -> UnreadableImage:
    """Error for a file of a data set that cannot be read as an image."""
    return UnreadableImage(
        f"{path} cannot be read as an image ({problem}); remove or replace it, or leave it out with "
        "python -m tal_fast.check_data FOLDER --out list.txt and --data.file_list list.txt"
    )


def unsupported_pixels(image: Image.Image) -> str | None:
    """Reason that the loaders would read different 8-bit pixels of an image; None if they read the same.

    The image is open, and its pixels are not loaded yet.
    """
    if image.format not in FORMATS:
        return f"format {image.format}, which not every loader reads; convert it to JPEG or PNG"
    if image.mode not in MODES or (image.format == "TIFF" and image.mode == "LA"):
        return f"pixels of mode {image.mode}, which the loaders convert to 8 bits in different ways"
    tiles = getattr(image, "tile", [])
    if image.format == "PPM" and any(tile[0] != "raw" or isinstance(tile[3], tuple) for tile in tiles):
        return "numbers as text or a largest value other than 255, which DALI reads differently"
    # Pillow keeps the upper 8 of 16 bits, with which pixels of 12 bits are nearly black.
    if any(";16" in str(tile[3]) for tile in tiles) or _jpeg2000_bits(image) > 8:
        return "more than 8 bits a channel, which have no standard conversion to 8 bits"
    return None


def _jpeg2000_bits(image: Image.Image) -> int:
    """Largest number of bits of a channel in the header of a JPEG 2000 file; 0 for other formats."""
    if image.format != "JPEG2000":
        return 0
    file = image.fp  # type: ignore[attr-defined]
    place = file.tell()
    file.seek(0)
    head = file.read(1 << 16)
    file.seek(place)
    start = head.find(b"\xff\x4f\xff\x51")  # SOC and SIZ; the number of channels is 40 bytes after them
    count = int.from_bytes(head[start + 40 : start + 42], "big") if start >= 0 else 0
    return max((1 + (bits & 127) for bits in head[start + 42 : start + 42 + 3 * count : 3]), default=0)


def error_summary(error: Exception, path: str) -> str:
    """Short text of a Pillow error about a file."""
    if isinstance(error, UnidentifiedImageError):
        return "it is empty" if os.path.exists(path) and os.path.getsize(path) == 0 else "no image format fits it"
    return one_line(error) or type(error).__name__
