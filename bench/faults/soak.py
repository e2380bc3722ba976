"""A long run of two processes with a random fault every minute: it must end as an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.faults.disks import fill, small_disk
from bench.faults.runs import (
    STEPS_PER_EPOCH,
    Impossible,
    Job,
    alive,
    command,
    expect,
    expect_same_end,
    last,
    options,
    say,
    steps_saved,
    undisturbed,
    wait_for,
)

PAUSE_S = 0.2
"""Sleep after every step, so that the disturbed run lasts while the undisturbed one beside it is done in minutes."""

RANK_TIMEOUT_S = 20

SHARE = 0.65
"""Share of the time that these sleeps are expected to take, beside training, validation and restarts."""


def _kill_all(job: Job, output: Path, draw: random.Random) -> None:
    ranks = job.ranks()
    for pid in (job.process.pid, *ranks):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _truncate(job: Job, output: Path, draw: random.Random) -> None:
    _kill_all(job, output, draw)
    job.process.wait()
    wait_for("the end of the ranks", lambda: not any(map(alive, job.known_ranks)))
    os.truncate(last(output), draw.randrange(last(output).stat().st_size))


def _signal_rank(number: signal.Signals) -> Callable[[Job, Path, random.Random], None]:
    def act(job: Job, output: Path, draw: random.Random) -> None:
        os.kill(draw.choice(job.ranks()), number)

    return act


def _signal_launcher(number: signal.Signals) -> Callable[[Job, Path, random.Random], None]:
    return lambda job, output, draw: os.kill(job.process.pid, number)


def _pause_rank(job: Job, output: Path, draw: random.Random) -> None:
    rank = draw.choice(job.ranks())
    os.kill(rank, signal.SIGSTOP)
    time.sleep(draw.uniform(1, RANK_TIMEOUT_S / 2))
    os.kill(rank, signal.SIGCONT)


def _full_disk(job: Job, output: Path, draw: random.Random) -> None:
    ballast = fill(output.parent)
    time.sleep(draw.uniform(1, 10))
    ballast.unlink()


FAULTS: dict[str, Callable[[Job, Path, random.Random], None]] = {
    "SIGKILL of all processes": _kill_all,
    "SIGKILL of one rank": _signal_rank(signal.SIGKILL),
    "SIGKILL of torchrun": _signal_launcher(signal.SIGKILL),
    "SIGTERM to torchrun": _signal_launcher(signal.SIGTERM),
    "SIGUSR1 to one rank": _signal_rank(signal.SIGUSR1),
    "SIGSTOP of one rank for good": _signal_rank(signal.SIGSTOP),
    "SIGSTOP and SIGCONT of one rank": _pause_rank,
    "last.pt truncated after SIGKILL of all processes": _truncate,
    "full disk for some seconds": _full_disk,
}


def _saved_since(output: Path, moment: float) -> bool:
    with contextlib.suppress(FileNotFoundError):  # just before a rename
        return last(output).stat().st_mtime > moment
    return False


def soak(folder: Path, minutes: float = 40, every: float = 60, seed: int | None = None) -> dict[str, Any]:
    """Train on two ranks for about ``minutes`` with a fault about every ``every`` seconds until the run ends."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    draw = random.Random(seed)
    epochs = max(2, round(minutes * 60 * SHARE / (PAUSE_S * STEPS_PER_EPOCH)))
    more = ("--rank-timeout", str(RANK_TIMEOUT_S), "--resume", "auto")
    say(f"seed {seed}: {epochs} epochs")
    counts, possible, starts = dict.fromkeys(FAULTS, 0), dict(FAULTS), 0
    began = time.monotonic()
    with ThreadPoolExecutor(1) as beside, contextlib.ExitStack() as stack:
        straight = beside.submit(undisturbed, folder, 2, epochs, *more[:2])
        try:
            disk = stack.enter_context(small_disk(folder))
        except Impossible:
            disk = folder
            del possible["full disk for some seconds"]
        output = disk / "run"
        words = [*command(2, ["bench.fault_points", f"slow:step:0:{PAUSE_S}"], "--max-restarts=1000")]
        words += options(output, epochs, *more)
        queue: list[str] = []
        disturbed = 0.0
        while True:
            starts += 1
            with Job(folder, words) as job:
                wait_for("two ranks", lambda job=job: len(job.ranks()) == 2 or job.process.poll() is not None)  # type: ignore[misc]
                due = time.monotonic() + every * draw.uniform(0.7, 1.3)
                while job.process.poll() is None:
                    time.sleep(0.1)
                    ranks = job.ranks()
                    # Never before the run has saved something since the last fault: it must come to its end.
                    if time.monotonic() < due or len(ranks) != 2 or not _saved_since(output, disturbed):
                        continue
                    if not queue:  # each kind equally often
                        queue = draw.sample(list(possible), len(possible))
                    name = queue.pop()
                    say(f"{(time.monotonic() - began) / 60:.1f} min, {steps_saved(output)} steps: {name}")
                    with contextlib.suppress(ProcessLookupError):
                        possible[name](job, output, draw)
                        counts[name] += 1
                    disturbed = time.time()
                    due = time.monotonic() + every * draw.uniform(0.7, 1.3)
                done = job.end()
                # Ranks that lost their launcher save and end by themselves.
                wait_for("the end of the ranks", lambda job=job: not any(map(alive, job.known_ranks)))  # type: ignore[misc]
            if done.returncode == 0:
                break
            expect(
                done.returncode in (1, -signal.SIGKILL, -signal.SIGTERM), "it ended otherwise than by the fault", done
            )
            expect(starts < 20 + 4 * minutes, "the run does not come to its end", done)
        taken = time.monotonic() - began
        expect_same_end(straight.result(), output)
    return {
        "minutes": round(taken / 60, 1),
        "faults": counts,
        "starts": starts,
        "steps": epochs * STEPS_PER_EPOCH,
        "seed": seed,
    }
