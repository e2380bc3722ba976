"""Regression check between two result files: ``python -m bench.compare OLD NEW``.

Compares each benchmark's ratio to the floor that ran in turns with it; seconds depend on the machine. A benchmark is
slower when its ratio rose by more than the tolerance and the two 95% intervals do not overlap. Exits with 1 when any
is, with 2 when nothing can be compared. Peers are not judged.

OLD may be a folder with a file for each kind of vector instructions (``AVX2.json``, ``AVX-512.json``): ratios depend on
them. Without NEW's kind in the folder nothing is judged.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = {"released", "paper", "tal_fast", "index", "tal"}
"""Peers that are this package; only these are judged."""


@dataclass(frozen=True)
class Change:
    """Old and new ratio to the floor of one benchmark."""

    name: str
    old: float
    new: float
    slower: bool
    faster: bool

    def __str__(self) -> str:
        verdict = "SLOWER" if self.slower else "faster" if self.faster else ""
        return f"{self.name:72} {self.old:9.2f} {self.new:9.2f} {self.new / self.old:7.2f}x  {verdict}".rstrip()


def load(path: Path) -> dict[str, Any]:
    """Read a result file of the benchmarks.

    Raises:
        ValueError: it is none, or one of its benchmarks failed its gate.
    """
    try:
        result = json.loads(path.read_text())
        failed, benchmarks = result["failed"], result["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of these benchmarks ({type(error).__name__}: {error})") from None
    if failed:
        raise ValueError(f"{path} has {failed} failed benchmarks, so that none of its figures counts; run it again")
    if not benchmarks:
        raise ValueError(f"{path} holds no benchmark")
    return result


def changes(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> list[Change]:
    """Compare the benchmarks of this package that are in both results.

    Args:
        old, new: as ``load`` gives them.
        tolerance: how much a ratio may rise or fall before it counts, as a share of the old one.
    """
    before = {b["name"]: b for b in old["benchmarks"] if "ratio" in b}
    found = []
    for b in new["benchmarks"]:
        a = before.get(b["name"])
        if a is None or "ratio" not in b or (b.get("peer") or b.get("method")) not in OURS:
            continue
        slower = b["ratio"] > a["ratio"] * (1 + tolerance) and b["ratio_low"] > a["ratio_high"]
        faster = a["ratio"] > b["ratio"] * (1 + tolerance) and a["ratio_low"] > b["ratio_high"]
        found.append(Change(b["name"], a["ratio"], b["ratio"], slower, faster))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="result file, or a folder of some")
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1, help="share a ratio may rise by (default 0.1)")
    args = parser.parse_args()
    try:
        new = load(args.new)
        path = args.old
        if path.is_dir():
            path /= f"{new['machine_info']['vectors']}.json"
            if not path.exists():
                print(f"not judged: there is no {path} to compare with")
                return
        old = load(path)
    except ValueError as error:
        parser.error(str(error))
    found = changes(old, new, args.tolerance)
    if not found:
        parser.error(f"{args.old} and {args.new} have no benchmark in common")
    print(f"{'ratio to the floor':72} {'old':>9} {'new':>9}")
    for change in found:
        print(change)
    slower = sum(change.slower for change in found)
    print(f"{slower} of {len(found)} slower beyond {args.tolerance:.0%} and the noise")
    raise SystemExit(1 if slower else 0)


if __name__ == "__main__":
    main()
