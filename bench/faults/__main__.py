"""Fault tolerance: ``python -m bench.faults [FAULT ...]``; all faults without a name.

Each fault is injected into real runs on digits on the CPU, its outcome is checked, and figures are measured. Two take
longer: ``kills --all`` shares ``--kills`` SIGKILLs among all configurations, and ``soak`` disturbs one run of two
processes every minute. The file of ``--out`` keeps the results of other faults; ``--docs`` writes the table of
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.faults.kills import kill_all, kills
from bench.faults.registry import FAULTS, write_table
from bench.faults.runs import Failed, Impossible, say
from bench.faults.soak import soak
from bench.harness import environment, write_json


def run(selected: dict[str, Callable[[Path], dict[str, Any]]], work: Path, out: Path | None) -> list[str]:
    """Inject faults one after the other and write the results after each; returns the names of those that failed."""
    kept = json.loads(out.read_text())["results"] if out is not None and out.exists() else []
    results = {entry["fault"]: entry for entry in kept}
    failed = []
    for name, inject in selected.items():
        began = time.monotonic()
        try:
            measured = inject(work / name)
        except Impossible as reason:
            say(f"{name}: not tried: {reason}")
            continue
        except (Failed, subprocess.TimeoutExpired) as error:
            failed.append(name)
            say(f"{name}: FAILED: {error}")
            continue
        seconds = round(time.monotonic() - began)
        results[name] = {"fault": name, "measured": measured, "seconds": seconds, "commit": environment()["commit"]}
        figures = ", ".join(f"{key}: {value}" for key, value in measured.items())
        say(f"{name}: as documented" + (f" ({figures})" if figures else ""))
        if out is not None:
            ordered = [results[known] for known in [*FAULTS, "soak"] if known in results]
            write_json(out, {"what": "faults and their outcomes", "environment": environment(), "results": ordered})
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}, soak; else all but soak")
    parser.add_argument("--all", action="store_true", help="kills: of all configurations")
    parser.add_argument("--kills", type=int, default=20, help="how many, for the fault of that name")
    parser.add_argument("--processes", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--jobs", type=int, default=2, help="configurations that are killed at the same time")
    parser.add_argument("--minutes", type=float, default=40, help="of the soak")
    parser.add_argument("--every", type=float, default=60, help="seconds between two faults of the soak")
    parser.add_argument("--seed", type=int, help="of the kills and the soak; another each time if not given")
    parser.add_argument("--work", type=Path, help="folder to work in; by default a temporary one")
    parser.add_argument("--out", type=Path, help="write the outcomes here as JSON")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/reliability.md, and nothing else")
    args = parser.parse_args()
    unknown = [name for name in args.faults if name not in (*FAULTS, "soak")]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}, soak")
    if args.docs:
        write_table()
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs, too
    work = args.work or Path(tempfile.mkdtemp(prefix="tal-fast-faults-"))
    if args.all:
        failed = [] if kill_all(work, args.kills, args.out, args.jobs, args.seed) else ["kills"]
    else:
        known = {name: fault.inject for name, fault in FAULTS.items()}
        known["kills"] = partial(kills, count=args.kills, processes=args.processes, seed=args.seed)
        known["soak"] = partial(soak, minutes=args.minutes, every=args.every, seed=args.seed)
        failed = run({name: known[name] for name in args.faults or FAULTS}, work, args.out)
    if failed:
        raise SystemExit(f"not as documented: {', '.join(failed)}; their files are in {work}")
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
