"""Running jobs beside each other: one a GPU, or as many as the cores allow, each a process that trains, then evaluates.

Everything a runner has to know lies in the jobs' folders, so runners may be killed at any point and started again, and
several of them (on one machine, or on several with one file system that has locks) share the jobs of an experiment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tal_fast.experiments.folder import ASKED, LOG, Folder
from tal_fast.experiments.plan import Experiment
from tal_fast.utils.signals import REQUEUE, StopRequest

RUNS = "runs"
_POLL_S = 0.1
_BUSY_S = 2.0  # between two looks at a job that another runner has

Environment = dict[str, str]


def folders(experiment: Experiment, output: Path) -> list[Folder]:
    """Of the jobs, in their order."""
    return [Folder(job, output / RUNS / job.name) for job in experiment.jobs]


def slots(experiment: Experiment, jobs: int | None = None) -> list[Environment]:
    """What to add to the environment of each job that runs at the same time as the others.

    Args:
        experiment: its jobs say whether they use GPUs and how many threads.
        jobs: how many at once; None: one a GPU, on the CPU as many as there are cores for their threads.
    """
    on_cpu = all(job.config.device == "cpu" for job in experiment.jobs)
    gpus = [] if on_cpu else _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{} for _ in range(jobs or max(1, cores // experiment.threads))]


def _gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


@dataclass
class _Running:
    """A job's process."""

    folder: Folder
    lock: int
    slot: int
    began: float
    stage: str = ""
    stage_began: float = 0.0
    log_start: int = 0
    process: subprocess.Popen[bytes] | None = None

    def tell(self) -> None:
        """To save and end: the process alone, whose loaders' processes it still needs for that."""
        if self.process is not None:
            self.process.terminate()

    def kill(self) -> None:
        """The process and those it has started."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Scheduler:
    """Runs what is not done yet.

    Args:
        experiment: whose jobs to run.
        output: folder of the experiment.
        slots: from ``slots``.
        say: told of progress.

    """

    def __init__(
        self, experiment: Experiment, output: Path, slots: Sequence[Environment], say: Callable[[str], None]
    ) -> None:
        self.experiment = experiment
        self._failed = 0
        self._slots = slots
        self._say = say
        self._folders = folders(experiment, output)
        self._waiting: list[Folder] = []
        self._running: list[_Running] = []
        self._seconds: list[float] = []  # of the jobs finished here
        self._environment: dict[str, Any] | None = None

    def run(self, stop: StopRequest) -> None:
        """Run all jobs to their end, or until ``stop`` has a signal: then the processes save and end too."""
        words = self.experiment.evaluate
        self._waiting = [folder for folder in self._folders if not folder.is_done(words)]
        done = len(self._folders) - len(self._waiting)
        if done:
            self._say(f"{done} of {len(self._folders)} jobs are done already")
        told = False
        looked: dict[str, float] = {}  # job -> when another runner had it
        try:
            while self._running or (self._waiting and not told):
                if stop.poll() and not told:
                    told = True
                    self._say("stopping: the jobs save and end; the same command goes on with them")
                    for running in self._running:
                        running.tell()
                if not told:
                    self._start_some(looked)
                for running in list(self._running):
                    with self._failing_alone(running):
                        self._look_at(running, told)
                time.sleep(_POLL_S)
        finally:
            for running in self._running:
                running.kill()

    def _start_some(self, looked: dict[str, float]) -> None:
        taken = {running.slot for running in self._running}
        free = [slot for slot in range(len(self._slots)) if slot not in taken]
        for folder in list(self._waiting):
            if not free:
                return
            name = folder.job.name
            if time.monotonic() - looked.get(name, -_BUSY_S) < _BUSY_S:
                continue
            folder.path.mkdir(parents=True, exist_ok=True)
            lock = folder.lock()
            if lock is None:
                if name not in looked:
                    self._say(f"{name} is being run by {folder.holder()}")
                looked[name] = time.monotonic()
                continue
            self._waiting.remove(folder)
            if folder.is_done(self.experiment.evaluate):
                os.close(lock)
                self._say(f"{name} was done by another runner")
                continue
            running = _Running(folder, lock, free[0], time.monotonic())
            with self._failing_alone(running):
                folder.check()  # again, now that nobody else may change it
                folder.prepare()
                self._start(running, "evaluate" if folder.is_trained() else "train")
                self._running.append(running)
                free.pop(0)

    @contextlib.contextmanager
    def _failing_alone(self, running: _Running) -> Iterator[None]:
        """A job whose folder cannot be read or written fails; the others go on."""
        try:
            yield
        except (ValueError, OSError, subprocess.SubprocessError) as problem:
            self._failed += 1
            self._say(f"{running.folder.job.name}: failed, {problem}")
            if running in self._running:
                self._running.remove(running)
            running.tell()
            os.close(running.lock)

    def _start(self, running: _Running, stage: str) -> None:
        folder = running.folder
        words = command(stage, folder.path, self.experiment.evaluate, folder.job.config.device)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.experiment.threads),
            "PYTHONUNBUFFERED": "1",
            **self._slots[running.slot],
        }
        if self._environment is None:
            self._environment = _describe_machine(environment)
        running.stage, running.stage_began = stage, time.monotonic()
        record = folder.record()
        attempt = {
            "stage": stage,
            "began": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "environment": self._environment,
            "seconds": None,
            "exit_code": None,
        }
        folder.update(attempts=[*record["attempts"], attempt], failed=None)
        with open(folder.path / LOG, "ab") as log:
            running.log_start = log.tell()
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            # Its own session: Ctrl-C is the runner's to pass on. It keeps the lock for as long as it lives.
            running.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, pass_fds=(running.lock,), preexec_fn=_end_with_parent(),
            )  # fmt: skip

    def _look_at(self, running: _Running, told: bool) -> None:
        """Go on to the next stage, or let go of the job, when its process has ended."""
        assert running.process is not None
        code = running.process.poll()
        if code is None:
            return
        folder, stage = running.folder, running.stage
        attempts = folder.record()["attempts"]
        attempts[-1] |= {"seconds": round(time.monotonic() - running.stage_began, 2), "exit_code": code}
        folder.update(attempts=attempts)
        if code == 0 and stage == "train":
            folder.update(trained=True)
            if not told:
                self._start(running, "evaluate")
                return
        self._running.remove(running)
        name = folder.job.name
        if code == 0 and stage == "evaluate":
            folder.set_evaluated(self.experiment.evaluate)
            self._seconds.append(time.monotonic() - running.began)
            self._say(f"{name}: done in {duration(self._seconds[-1])}; {self._left()}")
        elif not told:
            why = self._why(running, code)
            self._failed += 1
            folder.update(failed=why)
            self._say(f"{name}: {stage} failed, {why}; see {folder.path / LOG}")
        os.close(running.lock)

    def _why(self, running: _Running, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if code == REQUEUE:
            return "told to stop, and saved; the same command goes on with it"
        return f"exit code {code}: {running.folder.last_words(running.log_start)}"

    def _left(self) -> str:
        left = len(self._waiting) + len(self._running)
        done = f"{len(self._folders) - left - self._failed} of {len(self._folders)} done"
        if not left:
            return done
        # Of the running ones half is still to come, on the average.
        turns = (len(self._waiting) + 0.5 * len(self._running)) / len(self._slots)
        return f"{done}, about {duration(turns * sum(self._seconds) / len(self._seconds))} left"


def command(stage: str, run: Path, evaluate: Sequence[str], device: str) -> list[str]:
    """Of a job's process: ``train``, which goes on where it was, or ``evaluate``, on the ``device`` of the training
    unless the evaluation names one."""
    if stage == "train":
        return [sys.executable, "-m", "tal_fast.train", "--config", str(run / ASKED)]
    where = [] if "--device" in evaluate else ["--device", device]
    return [sys.executable, "-m", "tal_fast.evaluate", "--run", str(run), *evaluate, *where]


def duration(seconds: float) -> str:
    """``47 s``, ``12 min`` or ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _describe_machine(environment: Environment) -> dict[str, Any]:
    """Hardware, versions and commit as a job sees them; asked of a process, for the runner itself uses no GPU."""
    code = "import json; from tal_fast.utils.environment import environment; print(json.dumps(environment()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    del found["load"]
    return found


@cache
def _end_with_parent() -> Callable[[], None] | None:
    """For a child of a runner that is killed: on Linux it is told to stop then, which saves it.

    Elsewhere it trains to its end, with the lock. Loaded here, before the fork: the child makes one system call.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def end_with_parent() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(REQUEUE)

    return end_with_parent
