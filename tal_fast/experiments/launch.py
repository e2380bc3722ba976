"""Jobs of an experiment as an array of a cluster's scheduler, through submitit."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tal_fast.config.typed import one_line

if TYPE_CHECKING:
    from tal_fast.experiments.folder import Folder

logger = logging.getLogger(__name__)

CLUSTERS = {"slurm": "slurm", "submitit-local": "local"}
"""Launcher -> name of its cluster in submitit; the latter tries it out on one machine."""

FOLDER = "submitit"
_POLL_S = 1.0
_MINUTES = 1440
"""Time limit of a job unless it is given; submitit's own is 5 minutes."""
_SAVE_S = 60.0
"""Longest wait for a run to save before its time ends; submitit asks 90 s before by default."""


class Cell:
    """One job as submitit runs it: the command of the experiment for this job alone.

    Raises RuntimeError if the command fails.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Run the job to its end."""
        self._process = subprocess.Popen([sys.executable, "-m", "tal_fast.experiment", *self._words])
        while self._process.poll() is None:  # not wait, whose lock ``checkpoint`` would wait for
            time.sleep(0.1)
        if self._process.returncode:
            raise RuntimeError(f"exit code {self._process.returncode} of tal_fast.experiment {' '.join(self._words)}")

    def checkpoint(self) -> Any:
        """Called by submitit before the job is preempted or its time ends: save, and be queued again."""
        import submitit

        if self._process is not None:
            self._process.terminate()
            end = time.monotonic() + _SAVE_S
            while self._process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(Cell(self._words))


def launch(
    folders: Sequence[Folder],
    words: Sequence[str],
    output: Path,
    launcher: str,
    resources: Mapping[str, Any],
    at_once: int | None = None,
) -> None:
    """Submit jobs, by default as one array, and wait for them and for those that are queued or running already.

    Args:
        folders: of the jobs.
        words: words of ``tal_fast.experiment`` that run a job, but for its name.
        output: folder of the experiment, which all machines share.
        launcher: key of ``CLUSTERS``.
        resources: parameters of submitit's executor, such as ``timeout_min``, ``gpus_per_node``, ``slurm_partition``.
        at_once: number of jobs that are submitted at a time.

    Raises:
        ValueError: submitit is not installed, there is no such cluster here, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError(f"--launcher {launcher} needs submitit; install it with pip install submitit") from None
    try:
        executor = submitit.AutoExecutor(output / FOLDER / "%j", cluster=CLUSTERS[launcher])
        executor.update_parameters(**{"name": output.resolve().name, "timeout_min": _MINUTES, **resources})
    except (RuntimeError, NameError, TypeError, AssertionError) as error:
        raise ValueError(f"--launcher {launcher}: {one_line(error)}") from None
    queued = {folder.job.name: _queued(output, folder) for folder in folders} if launcher == "slurm" else {}
    jobs = {name: job for name, job in queued.items() if job is not None}
    waiting = [folder for folder in folders if folder.job.name not in jobs]
    logger.info("%d jobs to submit, %d are queued or running already", len(waiting), len(jobs))
    while jobs or waiting:
        room = len(waiting) if at_once is None else at_once - len(jobs)
        batch, waiting = waiting[:room], waiting[room:]
        with executor.batch() if batch else contextlib.nullcontext():
            submitted = [executor.submit(Cell([*words, "--only", folder.job.name])) for folder in batch]
        for folder, job in zip(batch, submitted, strict=True):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.set_submitted(job.job_id)
            jobs[folder.job.name] = job
        for name in [name for name, job in jobs.items() if job.done()]:
            job = jobs.pop(name)
            problem, why = job.exception(), "done"
            if problem is not None:
                reason = (str(problem).strip() or repr(problem)).splitlines()[-1]
                why = f"failed; see {job.paths.stderr} ({reason})"
            logger.info("%s: %s (job %s), %d left", name, why, job.job_id, len(jobs) + len(waiting))
        time.sleep(_POLL_S if jobs else 0)


def _queued(output: Path, folder: Folder) -> Any:
    """The job of a folder that Slurm has not ended; None if there is none."""
    import submitit

    job_id = folder.submitted()
    job: Any = None if job_id is None else submitit.SlurmJob(output / FOLDER / "%j", job_id)
    return None if job is None or job.done(force_check=True) else job
