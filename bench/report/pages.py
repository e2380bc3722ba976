"""Pages whose tables are written from results."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.report.cpu_tables import BLOCKS
from bench.report.gpu_tables import GPU_BLOCKS, kernels_table
from bench.report.results import ROOT, Results

PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")


def fill_in(text: str, cpu: Results, gpu: dict[str, Any] | None) -> str:
    """The page with each ``<!-- bench:NAME -->`` ... ``<!-- /bench -->`` block written anew.

    Raises:
        ValueError: a block that there is no table for.
    """

    def block(match: re.Match[str]) -> str:
        name = match[1]
        if name in GPU_BLOCKS:
            body = GPU_BLOCKS[name](gpu) if gpu else "Not yet run on a GPU."
        elif name in BLOCKS:
            body = BLOCKS[name](cpu)
        elif name == "kernels":
            body = kernels_table()
        else:
            raise ValueError(f"there is no table {name!r}; there are {', '.join([*BLOCKS, *GPU_BLOCKS, 'kernels'])}")
        return f"<!-- bench:{name} -->\n\n{body}\n\n<!-- /bench -->"  # Markdown needs the empty lines

    return re.sub(r"<!-- bench:([\w-]+) -->\n.*?<!-- /bench -->", block, text, flags=re.DOTALL)


def update_pages(pages: Sequence[Path], fill: Callable[[str], str], *, check: bool, command: str) -> list[str]:
    """Make pages anew; the names of those that changed.

    Args:
        pages: files.
        fill: a page's text -> what it should be.
        check: write nothing.
        command: what writes them.

    Raises:
        SystemExit: with ``check``, where a page is out of step.
    """
    stale = []
    for page in pages:
        before = page.read_text()
        after = fill(before)
        if after != before:
            stale.append(page.name)
            if not check:
                page.write_text(after)
    if check and stale:
        raise SystemExit(f"out of step with bench/results: {', '.join(stale)}; run {command}")
    return stale
