"""Runs that faults are injected into: commands, background jobs and the comparison of two ends."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.fault_points import children
from tal_fast.runs import checkpoint

ROOT = Path(__file__).parents[2]
STEPS_PER_EPOCH = 14
"""Steps of an epoch: 901 training images in batches of 64."""

TIMINGS = {"seconds", "images_per_s", "data_wait"}
"""Entries of metrics that differ between equal runs."""

PATHS = {"output", "resume", "last change of an image file"}
"""Entries of checkpoints that may differ between runs that must end equally; each host has its own files of digits."""


class Failed(Exception):
    """A run behaved otherwise than docs/reliability.md says."""


class Impossible(Exception):
    """A fault cannot be injected on this machine."""


def options(output: Path, epochs: int, *more: str) -> list[str]:
    """Command-line options of a small run on digits with random crops, shuffling and queues; the last of one holds."""
    words = (
        f"--config digits-tal --epochs {epochs} --checkpoint-every-steps 5 --data.loader torch --data.workers 0 "
        f"--device cpu --logger none --output {output}"
    )
    return [*words.split(), *more]


def command(processes: int, module: Sequence[str], *launcher: str) -> list[str]:
    """Command that runs a module, under torchrun for more than one process."""
    if processes == 1:
        return [sys.executable, "-m", *module]
    return [*torchrun("--standalone", f"--nproc-per-node={processes}", *launcher), "-m", *module]


def torchrun(*launcher: str) -> list[str]:
    """Command of torchrun under the current Python."""
    return [sys.executable, "-m", "torch.distributed.run", *launcher]


def surroundings(folder: Path) -> dict[str, str]:
    """Environment variables of a run: one thread, images cached beside ``folder``, this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "TAL_FAST_CACHE": str(folder.parent / "cache"), "PYTHONPATH": path}


class Job:
    """Background process; it and its children are killed at the end of the ``with`` block.

    Args:
        folder: where it runs; what it says goes to files there.
        words: the command.

    Attributes:
        known_ranks: all process numbers that ``ranks`` has ever returned.
    """

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.words = list(words)
        self._out, self._err = (Path(tempfile.mkstemp(dir=folder, suffix=suffix)[1]) for suffix in (".out", ".err"))
        self._ranks: list[int] = []
        self.known_ranks: set[int] = set()
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                self.words, env=surroundings(folder), cwd=folder, stdout=out, stderr=err, start_new_session=True
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.ranks()] if self.process.poll() is None else self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def ranks(self) -> list[int]:
        """Process numbers of the launcher's children."""
        self._ranks = children(self.process.pid)
        self.known_ranks.update(self._ranks)
        return self._ranks

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end and return the completed process."""
        self.process.wait(timeout)
        return subprocess.CompletedProcess(self.words, self.process.returncode, self.out, self.err)


def train(folder: Path, words: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command until it ends, with any exit code."""
    with Job(folder, words) as job:
        return job.end(timeout)


def undisturbed(folder: Path, processes: int, epochs: int, *more: str) -> Path:
    """Output folder of an undisturbed run to compare with, made once beside ``folder``."""
    name = hashlib.sha256(" ".join(more).encode()).hexdigest()[:8]
    output = folder.parent / f"undisturbed-{processes}-{epochs}-{name}"
    if not (output / "ended").exists():
        shutil.rmtree(output, ignore_errors=True)
        words = [*command(processes, ["tal_fast.train"]), *options(output, epochs, *more)]
        done = train(folder, words, timeout=300 + 5 * epochs)
        expect(done.returncode == 0, "the undisturbed run failed", done)
        (output / "ended").touch()
    return output


def resume_and_compare(folder: Path, output: Path, processes: int, epochs: int, *more: str) -> None:
    """Resume a run and check that it ends like an undisturbed one."""
    words = options(output, epochs, *more, "--resume", "auto")
    done = train(folder, [*command(processes, ["tal_fast.train"]), *words])
    expect(done.returncode == 0, f"{output} does not go on", done)
    expect_same_end(undisturbed(folder, processes, epochs, *more), output)


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 120) -> Any:
    """Poll ``condition`` and return its first true value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.005)
    return value


def alive(pid: int) -> bool:
    """Whether a process is running (zombies are not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def last(output: Path) -> Path:
    return output / checkpoint.FOLDER / checkpoint.LAST


def steps_saved(output: Path) -> int:
    """Number of optimizer steps in the newest intact checkpoint."""
    folder = output / checkpoint.FOLDER
    if not checkpoint.exists(folder):
        return 0
    content, _, _ = checkpoint.load_newest(folder)
    return content["epoch"] * STEPS_PER_EPOCH + content["step"]


def say(what: str) -> None:
    """Print a line of progress with the time."""
    print(f"{time.strftime('%H:%M:%S')} {what}", flush=True)


def expect(condition: bool, what: str, done: subprocess.CompletedProcess[str] | None = None) -> None:
    if not condition:
        tail = f"\n--- exit code {done.returncode}, its last words:\n{done.stderr[-3000:]}" if done else ""
        raise Failed(what + tail)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every entry of a checkpoint but timings and paths."""
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        yield name, value
        return
    for key, inner in pairs:
        if key not in TIMINGS and not (name in (".config", ".shape.conditions") and key in PATHS):
            yield from leaves(inner, f"{name}.{key}")


def differences(one: Path, other: Path, checkpoints: Sequence[str] = (checkpoint.LAST, checkpoint.BEST)) -> list[str]:
    """Differences between two finished runs: entries of the last and best checkpoint, metrics.csv."""
    found = []
    for name in checkpoints:
        mine, yours = (dict(leaves(checkpoint.load(run / checkpoint.FOLDER / name))) for run in (one, other))
        for key in sorted(mine.keys() | yours.keys()):
            a, b = mine.get(key), yours.get(key)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
            if not same:
                found.append(name + key)
    tables = [read_table(run / "metrics.csv") for run in (one, other)]
    if tables[0] != tables[1]:
        found.append("metrics.csv")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the timings."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def expect_same_end(one: Path, other: Path) -> None:
    found = differences(one, other)
    expect(not found, f"{other} did not end as {one}: {len(found)} entries, {', '.join(found[:8])} ... differ")
    left = [path for path in other.rglob(".*") if path.is_file() and path.name not in (".lock", ".tal-fast.lock")]
    expect(not left, f"temporary files were left behind: {', '.join(map(str, left))}")
