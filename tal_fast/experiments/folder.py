"""Folder of one job: the run's own files, and the files of the scheduler.

- ``asked.yaml``: configuration that the folder was made for; a job of another configuration is refused.
- ``job.json``: attempts with times and exit codes, whether training has ended, and which evaluation ``report.json``
  comes from.
- ``log.txt``: output of training and evaluation.
- ``submitted.txt``: number of the cluster's job, with ``--launcher slurm``.
- ``lock``: held by the scheduler and, through inheritance, by the job's processes. It is free once all of them have
  ended, however they ended, so a lock is never stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tal_fast.config.parse import read_yaml
from tal_fast.config.schema import Config
from tal_fast.config.typed import one_line
from tal_fast.experiments.plan import Job, from_here
from tal_fast.runs.folder import CONFIG_FILE
from tal_fast.runs.resume import differences
from tal_fast.utils.io import write_text
from tal_fast.utils.locks import lock
from tal_fast.utils.own_code import file_digest

REQUESTED, RECORD, LOG, LOCK, SUBMITTED = "asked.yaml", "job.json", "log.txt", "lock", "submitted.txt"
REPORT = "report.json"
_ATTEMPT = {"stage", "environment", "seconds"}


def own_code(config: Config) -> dict[str, str]:
    """Digests of the files of your own that a configuration names, by option."""
    names = {"method.name": config.method.name, "data.dataset": config.data.dataset}
    return {key: digest for key, name in names.items() if (digest := file_digest(name)) is not None}


@dataclass(frozen=True)
class Folder:
    """Folder of a job, which need not exist yet."""

    job: Job
    path: Path

    def check(self) -> None:
        """Raise ValueError if the folder was made for another configuration."""
        requested = self.path / REQUESTED
        if not requested.is_file():
            if (self.path / CONFIG_FILE).exists():
                raise ValueError(f"{self.path} holds a run that no experiment made; name another --output")
            return
        now = Config.from_dict(from_here(self.job.config.to_dict()))  # as ``prepare`` writes it
        try:
            saved = from_here(read_yaml(requested))
            changes, before = differences(saved, now), Config.from_dict(saved).data.ood
        except ValueError as error:
            raise ValueError(f"{requested} cannot be used ({one_line(error)}); delete {self.path}") from None
        digests = self.record()["own_code"]
        changes += [f"the file of {key} has changed" for key, d in own_code(now).items() if digests.get(key, d) != d]
        if before != now.data.ood:  # evaluation reads these sets from the run
            changes.append(f"data.ood was {before} and is {now.data.ood}: add sets under 'evaluate' instead")
        if changes:
            raise ValueError(
                f"{self.path} was made by another configuration ({', '.join(changes)}); set it back, give the method "
                "another name, name another --output, or delete the folder"
            )

    def prepare(self) -> None:
        """Make the folder and write its configuration."""
        values = {**from_here(self.job.config.to_dict()), "output": str(self.path)}
        write_text(self.path / REQUESTED, yaml.safe_dump(values, sort_keys=False))
        if digests := own_code(self.job.config):
            self.update(own_code=digests)

    def record(self) -> dict[str, Any]:
        """Content of ``job.json``: ``trained``, ``evaluated`` (options, report's hash), ``failed``, ``attempts``, and
        ``own_code``, digests of your own files by option."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
            attempts = record.get("attempts", []) if isinstance(record, dict) else None
            whole = isinstance(attempts, list) and all(isinstance(a, dict) and a.keys() >= _ATTEMPT for a in attempts)
            if not whole:
                raise ValueError("it is no record of a job")
        except FileNotFoundError:
            record = {}
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.path / RECORD} cannot be read ({error}); delete it") from None
        empty: dict[str, Any] = {"trained": False, "evaluated": None, "failed": None, "attempts": [], "own_code": {}}
        return {**empty, **record}

    def update(self, **changes: Any) -> None:
        """Change entries of the record."""
        write_text(self.path / RECORD, json.dumps({**self.record(), **changes}, indent=1) + "\n")

    def submitted(self) -> str | None:
        """Number of the cluster's job that the job was last submitted as."""
        try:
            return (self.path / SUBMITTED).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return None

    def set_submitted(self, number: str) -> None:
        """Write the number to a file of its own, as the cluster's job may be writing its record already."""
        write_text(self.path / SUBMITTED, number + "\n")

    def status(self, options: tuple[str, ...]) -> tuple[str, float]:
        """State of the job for these evaluation options, such as ``to train``, and the seconds spent so far."""
        record = self.record()
        spent = sum(attempt["seconds"] or 0.0 for attempt in record["attempts"])
        if self.is_done(options):
            return "done", spent
        left = "to evaluate" if record["trained"] else "to train"
        return left + (f", failed: {record['failed']}" if record["failed"] else ""), spent

    def set_evaluated(self, options: tuple[str, ...]) -> None:
        """Record the evaluation options that ``report.json`` was made with."""
        self.update(evaluated={"words": list(options), "report": self._report_hash()})

    def is_done(self, options: tuple[str, ...]) -> bool:
        """Whether ``report.json`` is there, made with these evaluation options and unchanged since."""
        report = self._report_hash()
        return report is not None and self.record()["evaluated"] == {"words": list(options), "report": report}

    def _report_hash(self) -> str | None:
        try:
            return hashlib.sha256((self.path / REPORT).read_bytes()).hexdigest()
        except FileNotFoundError:
            return None

    def last_error(self, start: int = 0) -> str:
        """Last line of the log after byte ``start`` that reports an error, or else its last line."""
        try:
            with open(self.path / LOG, "rb") as file:
                file.seek(max(start, file.seek(0, os.SEEK_END) - 10_000))
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except FileNotFoundError:
            return ""
        errors = [line for line in lines if line.startswith("error")]
        return (errors or lines or [""])[-1]

    def lock(self) -> int | None:
        """Lock the folder; raises ValueError if the file system has no locks.

        Returns a file descriptor that holds the lock until it and every copy in a child process is closed; None if
        another scheduler holds the lock.
        """
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        held = lock(handle)
        if not held:
            os.close(handle)
            if held is None:
                raise ValueError(f"{self.path / LOCK} cannot be locked, as its disk has no locks; choose another disk")
            return None
        with contextlib.suppress(OSError):  # on a full disk the lock holds, without saying whose it is
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{platform.node()}, process {os.getpid()}\n".encode(), 0)
        return handle

    def holder(self) -> str:
        """Machine and process that hold the lock."""
        try:
            return (self.path / LOCK).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return "another scheduler"
