"""Committed results of the benchmarks, to be asked for by what they measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.compare import load

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"

MOST_LOAD = 1.5
"""Processes a core up to which a wall-clock figure is published. Two threads wait for each other: with more processes
than cores a slow peer takes ten times as long and a fast one as long as ever, which would flatter the fast one."""

Row = dict[str, Any]


class Results:
    """The benchmarks of some files, to be asked for by what they measured."""

    def __init__(self, files: list[dict[str, Any]]) -> None:
        self.files = files
        self.withheld = 0
        self.rows: list[Row] = []
        for file in files:
            busy = MOST_LOAD * file["machine_info"]["cores"]
            for row in file["benchmarks"]:
                if row["clock"] == "wall" and row["load"] > busy:
                    self.withheld += 1
                else:
                    self.rows.append(row)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Every JSON file of a folder.

        Raises:
            ValueError: there is none, or one does not count (``bench.compare.load``).
        """
        paths = sorted(folder.glob("*.json"))
        if not paths:
            raise ValueError(f"{folder} holds no results; make bench measures them")
        return cls([load(path) for path in paths])

    def find(self, group: str, **facts: Any) -> list[Row]:
        return [r for r in self.rows if r["group"] == group and all(r.get(k) == v for k, v in facts.items())]

    def one(self, group: str, **facts: Any) -> Row | None:
        found = self.find(group, **facts)
        return found[0] if found else None
