"""MkDocs hook: pages kept at the repository's root, and links to files that are not part of the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
FENCES = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
CODE_OR_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)|`[^`]*`")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Text of a page for the site.

    A page of ``INCLUDED`` has the text of its file at the root. Links are written for the repository; here those to
    documentation pages are made relative to the page, and those to other files of the repository become plain text.
    """
    uri = page.file.src_uri
    here = posixpath.dirname(uri)
    folder = posixpath.join("docs", here)
    if uri in INCLUDED:
        markdown, folder = (ROOT / INCLUDED[uri]).read_text(encoding="utf-8"), ""

    def relink(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if text is None or "://" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        path = next((f"docs/{own}" for own, file in INCLUDED.items() if file == path), path)
        if not path.startswith("docs/"):
            if not (ROOT / path).exists():
                raise FileNotFoundError(f"{uri}: {target} is not in the repository")
            return text
        return f"[{text}]({posixpath.relpath(path, posixpath.join('docs', here))}{anchor})"

    parts = FENCES.split(markdown)
    return "".join(part if i % 2 else CODE_OR_LINK.sub(relink, part) for i, part in enumerate(parts))
