"""Text files that come with data sets, in the encodings that editors write."""

from __future__ import annotations

import codecs
from pathlib import Path

from tal_fast.utils.io import refuse_pipe


def read_text(path: Path) -> str:
    """Text of a file in UTF-8, with or without a byte order mark, or UTF-16 with one; bytes of file names are kept.

    Raises OSError if the file cannot be read and ValueError if it is not text, or a pipe or a device.
    """
    refuse_pipe(path)
    data = path.read_bytes()
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding, errors="surrogateescape")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-16 ({error.reason}); save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} is no text in UTF-8 (it contains a zero byte); save it as UTF-8")
    return text.replace("\r\n", "\n")
