"""All faults with their documented outcomes, and the table of docs/reliability.md."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.faults import disks, images, ranks, signals, soak
from bench.faults.kills import SAME, kills
from bench.faults.runs import ROOT

RESULTS = ROOT / "bench" / "results" / "faults_cpu.json"
KILLS = ROOT / "bench" / "results" / "faults_kills_cpu.json"
DOCS = ROOT / "docs" / "reliability.md"


@dataclass(frozen=True)
class Fault:
    """Fault with its documented outcome.

    Attributes:
        what: what is done to a run.
        outcome: what happens then; ``inject`` checks it.
        code: exit code of the command, or of torchrun and its processes.
        inject: injects the fault into runs in a folder and returns figures; raises ``Failed`` if the outcome differs.
    """

    what: str
    outcome: str
    code: str
    inject: Callable[[Path], dict[str, Any]]


_SAME = "resumed, it ends as the undisturbed run"
_SAVED = f"saved after the step; {_SAME}"

FAULTS: dict[str, Fault] = {
    "kills": Fault(
        "SIGKILL at 20 random points: within steps, in validation, while a file is half written, when it is whole but "
        "not renamed, before and after a rename",
        "resumed each time, it ends as the undisturbed run",
        "137",
        kills,
    ),
    "sigkill-validation": Fault(
        "SIGKILL in validation",
        f"no step is lost; {_SAME}",
        "137",
        partial(signals.in_validation, how="job"),
    ),
    "damaged": Fault(
        "last.pt truncated, bit-flipped, emptied or lost",
        "the one before is used, with a warning; ends as the undisturbed run. Without an intact one: refused, "
        "nothing changed",
        "0; 2",
        disks.damaged,
    ),
    "damaged-best": Fault(
        "best.pt truncated",
        "evaluation names it; last.pt is a file of its own and is evaluated with `--checkpoint last`",
        "2",
        disks.damaged_best,
    ),
    "full-disk": Fault(
        "disk full while saving",
        "a warning; training continues and the next checkpoint is tried. With space by then: ends as the undisturbed "
        f"run. Else the last intact checkpoint is kept; {_SAME}",
        "0; 2",
        disks.full_disk,
    ),
    "full-disk-start": Fault(
        "disk full at the start",
        "an error message; with space, the same command starts",
        "2",
        disks.full_at_start,
    ),
    "read-only": Fault(
        "output on a read-only disk, or below a file",
        "an error message; on a writable disk, the same command starts",
        "2",
        disks.read_only,
    ),
    "deleted-folder": Fault(
        "output folder deleted during training",
        "written again with the next checkpoint (best.pt with the next best epoch); weights and metrics as undisturbed",
        "0",
        disks.deleted_folder,
    ),
    "two-runs": Fault(
        "second run started on the folder of a running one",
        "refused, naming machine and process of the first, which goes on",
        "2",
        disks.two_runs,
    ),
    "two-evaluations": Fault(
        "two runs evaluated at the same time with one cache",
        "each reports its own numbers",
        "0",
        disks.two_evaluations,
    ),
    "corrupt-image": Fault(
        "image file truncated while training (torch loader)",
        "named once, counted in `metrics.csv` (`unreadable`), training continues without it. With "
        "`--data.max_unreadable 0` the steps before it are saved; with the file repaired the run ends as the "
        "undisturbed one",
        "0; 2",
        images.corrupt_image,
    ),
    "corrupt-image-dali": Fault("the same with DALI", "the same", "0; 2", partial(images.corrupt_image, loader="dali")),
    "stopped-worker": Fault(
        "loader's worker process stopped (SIGSTOP)",
        "an error message after `--data.timeout`; the steps before are saved",
        "2",
        images.stopped_worker,
    ),
    "exception": Fault(
        "exception in a step",
        f"traceback; the last whole step is saved; {_SAME}",
        "1",
        signals.exception,
    ),
    "not-finite": Fault(
        "loss that is not finite",
        "an error message with step and learning rate; both checkpoints are finite, and go on with `--allow optim.lr "
        "--optim.lr SMALLER` or as they are",
        "2",
        signals.not_finite,
    ),
    "sigterm": Fault("SIGTERM", _SAVED, "75", partial(signals.stop, number=signal.SIGTERM)),
    "sigterm-validation": Fault(
        "SIGTERM in validation",
        f"ends within a batch, no step is lost; {_SAME}",
        "75",
        partial(signals.in_validation, how="term"),
    ),
    "sigterm-torchrun": Fault(
        "SIGTERM to torchrun, two ranks",
        _SAVED,
        "1 (ranks: 75)",
        partial(signals.stop, number=signal.SIGTERM, processes=2),
    ),
    "sigusr1": Fault("SIGUSR1", _SAVED, "75", partial(signals.stop, number=signal.SIGUSR1)),
    "sigusr1-torchrun": Fault(
        "SIGUSR1 to torchrun configured to forward it",
        _SAVED,
        "1 (ranks: 75)",
        partial(signals.stop, number=signal.SIGUSR1, processes=2),
    ),
    "sigusr1-rank": Fault(
        "SIGUSR1 to one of two ranks",
        f"both stop at the same step; {_SAVED}",
        "1 (ranks: 75)",
        partial(signals.stop, number=signal.SIGUSR1, processes=2, one_rank=True),
    ),
    "lost-rank": Fault(
        "one of two ranks killed, `--max-restarts=1`",
        "torchrun ends the other and restarts both; ends as the undisturbed run",
        "0",
        ranks.lost_rank,
    ),
    "hung-rank": Fault(
        "one of two ranks stopped (SIGSTOP), `--max-restarts=1`",
        "the other names it after `--rank-timeout` and ends with 75; torchrun restarts both; ends as the "
        "undisturbed run",
        "0",
        ranks.hung_rank,
    ),
    "unequal-ranks": Fault(
        "ranks started with different options, code or data",
        "refused on every rank, naming rank and option",
        "1 (ranks: 2)",
        ranks.unequal_ranks,
    ),
    "lost-launcher": Fault(
        "torchrun killed",
        f"its ranks notice, save after the step and end; {_SAME}",
        "137 (ranks: 75)",
        ranks.lost_launcher,
    ),
}


def table() -> str:
    """Table of docs/reliability.md: the faults with their measured figures."""
    results = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    measured = {entry["fault"]: entry for entry in results}
    lines = ["| fault | what happens | exit code | `python -m bench.faults` | measured |", "|---|---|---|---|---|"]
    for name, fault in FAULTS.items():
        entry = measured.get(name)
        figures = "not tried" if entry is None else _figures(entry["measured"]) or "passes"
        lines.append(f"| {fault.what} | {fault.outcome} | {fault.code} | `{name}` | {figures} |")
    killed = json.loads(KILLS.read_text()) if KILLS.exists() else {"results": []}
    asked = sum(entry["asked"] for entry in killed["results"])
    well = sum(entry["asked"] for entry in killed["results"] if entry["result"] == SAME)
    figures = f"{well} of {asked} in {len(killed['results'])} configurations" if well else "not tried"
    command = "kills --all --kills 200"
    lines.append(f"| SIGKILL, shared among all configurations | as with one | 137 | `{command}` | {figures} |")
    entry = measured.get("soak")
    figures = "not tried" if entry is None else _figures(entry["measured"])
    what = "two ranks, each minute one of nine faults (" + ", ".join(soak.FAULTS) + ")"
    lines.append(f"| {what} | ends as the undisturbed run | 0 | `soak --minutes 40` | {figures} |")
    return "\n".join(lines) + "\n"


def _figures(measured: dict[str, Any]) -> str:
    shown = {name: value for name, value in measured.items() if name not in ("seed", "runs", "steps", "damages")}
    parts = []
    for name, value in shown.items():
        if isinstance(value, dict):
            value = " + ".join(f"{count} {kind}" for kind, count in value.items() if count)
        elif isinstance(value, float):
            value = f"{value:g}"
        parts.append(f"{name}: {value}")
    return ", ".join(parts)


def write_table() -> None:
    """Write the table between its marks in docs/reliability.md."""
    text = DOCS.read_text()
    head, begin, rest = text.partition("<!-- table by python -m bench.faults --docs -->\n")
    _, end, tail = rest.partition("<!-- end of the table -->")
    if not end:
        raise ValueError(f"{DOCS} lacks the marks of the table")
    DOCS.write_text(f"{head}{begin}\n{table()}\n{end}{tail}")
