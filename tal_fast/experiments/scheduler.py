"""Scheduler that runs the jobs of an experiment side by side: one per GPU, or as many as the cores allow.

Each job is a process that trains, followed by one that evaluates. All state is in the jobs' folders, so a scheduler may
be killed and started again at any time, and several schedulers, on one machine or on a file system with locks, share
the jobs of an experiment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
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

from tal_fast.experiments.folder import LOG, REQUESTED, Folder
from tal_fast.experiments.plan import Experiment
from tal_fast.utils.logs import duration
from tal_fast.utils.process import sentence
from tal_fast.utils.signals import REQUEUE, StopRequest

logger = logging.getLogger(__name__)

RUNS = "runs"
_POLL_S = 0.1
_SAVE_S = 60.0
"""Longest wait for jobs to save after a fault of the scheduler."""
_RETRY_S = 2.0
"""Seconds between two attempts to lock a job that another scheduler holds."""

Environment = dict[str, str]


def job_folders(experiment: Experiment, output: Path) -> list[Folder]:
    """Folders of the jobs, in their order."""
    return [Folder(job, output / RUNS / job.name) for job in experiment.jobs]


def chosen(folders: Sequence[Folder], only: Sequence[str] | None, failed: bool) -> list[Folder]:
    """Folders of the jobs with these names or hashes, or of those that failed; raises ValueError for an unknown one."""
    if failed:
        return [folder for folder in folders if folder.record()["failed"]]
    if only is None:
        return list(folders)
    unknown = set(only) - {name for folder in folders for name in (folder.job.name, folder.job.id)}
    if unknown:
        raise ValueError(f"--only {min(unknown)}: no job has this name or hash; --status lists them")
    return [folder for folder in folders if folder.job.name in only or folder.job.id in only]


def slots(experiment: Experiment, jobs: int | None = None) -> list[Environment]:
    """Environment variables for each of the jobs that run at the same time.

    By default there is one job per GPU, or on the CPU as many as the cores allow for their threads.
    """
    only_cpu = all(job.config.device == "cpu" for job in experiment.jobs)
    gpus = [] if only_cpu else _gpus()
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]} for i in range(jobs or len(gpus))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [{} for _ in range(jobs or max(1, cores // experiment.threads))]


def _gpus() -> list[str]:
    import torch

    count = torch.cuda.device_count()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if visible else [str(i) for i in range(count)]


@dataclass
class _RunningJob:
    """Job whose process is running."""

    folder: Folder
    slot: int
    start: float
    lock: int | None = None
    stage: str = ""
    stage_start: float = 0.0
    log_start: int = 0
    process: subprocess.Popen[bytes] | None = None

    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self.process is not None and self.process.poll() is None

    def terminate(self) -> None:
        """Ask the process to save and end; its data-loading workers stay, for it needs them until then."""
        if self.process is not None:
            self.process.terminate()

    def release(self) -> None:
        """Release the lock, once."""
        handle, self.lock = self.lock, None
        if handle is not None:
            os.close(handle)

    def kill(self) -> None:
        """Kill the process and its children."""
        if self.is_alive():
            assert self.process is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Scheduler:
    """Scheduler of the unfinished jobs of an experiment, of which ``len(slots)`` run at a time."""

    def __init__(self, experiment: Experiment, folders: Sequence[Folder], slots: Sequence[Environment]) -> None:
        self.experiment = experiment
        self._failed = 0
        self._slots = slots
        self._folders = folders
        self._waiting: list[Folder] = []
        self._running: list[_RunningJob] = []
        self._seconds: list[float] = []  # durations of the jobs finished here
        self._last_tries: dict[str, float] = {}  # name -> time at which another scheduler held the job
        self._environment: dict[str, Any] | None = None

    def run(self, stop: StopRequest) -> None:
        """Run all jobs, or until ``stop`` has received a signal; then the running jobs save and end first."""
        self._waiting = [folder for folder in self._folders if not folder.is_done(self.experiment.evaluate)]
        done = len(self._folders) - len(self._waiting)
        if done:
            logger.info("%d of %d jobs are done already", done, len(self._folders))
        stopping = False
        try:
            while self._running or (self._waiting and not stopping):
                if stop.poll() and not stopping:
                    stopping = True
                    logger.info("stopping: the jobs save and end; the same command resumes them")
                    for running in self._running:
                        running.terminate()
                if not stopping:
                    self._start_jobs()
                for running in list(self._running):
                    with self._isolating_failures(running):
                        self._update(running, stopping)
                time.sleep(_POLL_S)
        except Exception:  # unforeseen: the jobs save before they are killed
            for running in self._running:
                running.terminate()
            deadline = time.monotonic() + _SAVE_S
            while any(running.is_alive() for running in self._running) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            raise
        finally:
            for running in self._running:
                running.kill()

    def _start_jobs(self) -> None:
        taken = {running.slot for running in self._running}
        free = [slot for slot in range(len(self._slots)) if slot not in taken]
        for folder in list(self._waiting):
            if not free:
                return
            name = folder.job.name
            if time.monotonic() - self._last_tries.get(name, -_RETRY_S) < _RETRY_S:
                continue
            running = _RunningJob(folder, free[0], time.monotonic())
            with self._isolating_failures(running):
                folder.path.mkdir(parents=True, exist_ok=True)
                running.lock = folder.lock()
                if running.lock is None:
                    if name not in self._last_tries:
                        logger.info("%s is being run by %s", name, folder.holder())
                    self._last_tries[name] = time.monotonic()
                    continue
                self._waiting.remove(folder)
                if folder.is_done(self.experiment.evaluate):
                    running.release()
                    logger.info("%s was done by another scheduler", name)
                    continue
                folder.check()  # again, now that no other scheduler can change it
                folder.prepare()
                self._start(running, "evaluate" if folder.record()["trained"] else "train")
                self._running.append(running)
                free.pop(0)

    @contextlib.contextmanager
    def _isolating_failures(self, running: _RunningJob) -> Iterator[None]:
        """Let a job fail whose folder cannot be read or written, and continue with the others."""
        try:
            yield
        except (ValueError, OSError, subprocess.SubprocessError) as error:
            self._failed += 1
            folder = running.folder
            logger.info("%s: failed, %s", folder.job.name, sentence(error))
            if folder in self._waiting:
                self._waiting.remove(folder)
            if running in self._running:
                self._running.remove(running)
            running.terminate()
            if running.stage:  # the folder is this job's
                with contextlib.suppress(ValueError, OSError):
                    folder.update(failed=sentence(error))
            running.release()

    def _start(self, running: _RunningJob, stage: str) -> None:
        folder = running.folder
        assert running.lock is not None
        running.stage, running.stage_start = stage, time.monotonic()
        words = command(stage, folder.path, self.experiment.evaluate, folder.job.config.device)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.experiment.threads),
            "PYTHONUNBUFFERED": "1",
            **self._slots[running.slot],
        }
        if self._environment is None:
            self._environment = _describe_machine(environment)
        attempt = {
            "stage": stage,
            "began": time.strftime("%Y-%m-%d %H:%M:%S%z"),
            "environment": self._environment,
            "seconds": None,
            "exit_code": None,
        }
        folder.update(attempts=[*folder.record()["attempts"], attempt], failed=None)
        with open(folder.path / LOG, "ab") as log:
            running.log_start = log.tell()
            log.write(f"$ {shlex.join(words)}\n".encode())
            log.flush()
            # In a new session, so that only the scheduler passes Ctrl-C on; the lock is inherited.
            running.process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, pass_fds=(running.lock,), preexec_fn=_end_with_parent(),
            )  # fmt: skip

    def _update(self, running: _RunningJob, stopping: bool) -> None:
        """Start the next stage, or release the job, once its process has ended."""
        assert running.process is not None
        code = running.process.poll()
        if code is None:
            return
        folder, stage = running.folder, running.stage
        attempts = folder.record()["attempts"]
        attempts[-1] |= {"seconds": round(time.monotonic() - running.stage_start, 2), "exit_code": code}
        folder.update(attempts=attempts)
        if code == 0 and stage == "train":
            folder.update(trained=True)
            if not stopping:
                self._start(running, "evaluate")
                return
        self._running.remove(running)
        name = folder.job.name
        if code == 0 and stage == "evaluate":
            folder.set_evaluated(self.experiment.evaluate)
            self._seconds.append(time.monotonic() - running.start)
            logger.info("%s: done in %s; %s", name, duration(self._seconds[-1]), self._remaining())
        elif not stopping:
            reason = _failure(running, code)
            folder.update(failed=reason)
            self._failed += 1
            logger.info("%s: %s failed, %s; see %s", name, stage, reason, folder.path / LOG)
        running.release()

    def _remaining(self) -> str:
        left = len(self._waiting) + len(self._running)
        done = f"{len(self._folders) - left - self._failed} of {len(self._folders)} done"
        if not left:
            return done
        # Running jobs are half done on average.
        turns = (len(self._waiting) + 0.5 * len(self._running)) / len(self._slots)
        return f"{done}, about {duration(turns * sum(self._seconds) / len(self._seconds))} left"


def _failure(running: _RunningJob, code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code == REQUEUE:
        return "stopped by a signal and saved; the same command resumes it"
    return f"exit code {code}: {running.folder.last_error(running.log_start)}"


def command(stage: str, run: Path, evaluate: Sequence[str], device: str) -> list[str]:
    """Command line of a stage, ``train`` or ``evaluate``; evaluation is on ``device`` unless its options name one."""
    if stage == "train":
        return [sys.executable, "-m", "tal_fast.train", "--config", str(run / REQUESTED)]
    device_options = [] if "--device" in evaluate else ["--device", device]
    return [sys.executable, "-m", "tal_fast.evaluate", "--run", str(run), *evaluate, *device_options]


def _describe_machine(environment: Environment) -> dict[str, Any]:
    """Hardware, versions and commit, from a process of its own: the scheduler itself must not occupy a GPU."""
    code = "import json; from tal_fast.utils.environment import environment; print(json.dumps(environment()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    machine = json.loads(done.stdout.splitlines()[-1])
    del machine["load"]
    return machine


@cache
def _end_with_parent() -> Callable[[], None] | None:
    """Function that makes a child save and end when its scheduler is killed; None outside Linux.

    Elsewhere the child finishes its training and holds the lock meanwhile. The library is loaded here, before the fork:
    the child only makes one system call.
    """
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def end_with_parent() -> None:
        prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(REQUEUE)

    return end_with_parent
