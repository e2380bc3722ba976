"""A job's folder: what it was made for, what has happened in it, and whose it is at the moment.

It is the run's own folder (``config.yaml``, ``checkpoints/``, ``report.json``, ...) with four files more:

- ``asked.yaml``: the configuration it was made for. Another one is refused, never mixed in.
- ``job.json``: attempts with their times and exit codes; the training's end; which evaluation ``report.json`` is of.
- ``log.txt``: what training and evaluation said.
- ``lock``: held by the runner that has the job *and by its processes*, which inherit it. A runner that is killed frees
  its jobs at the moment its processes have ended, not before, and nothing is left behind that could be stale.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tal_fast.config.parse import parse_yaml
from tal_fast.config.schema import Config
from tal_fast.experiments.plan import Job
from tal_fast.runs.folder import CONFIG_FILE
from tal_fast.runs.resume import differences
from tal_fast.utils.io import replacing

ASKED, RECORD, LOG, LOCK = "asked.yaml", "job.json", "log.txt", "lock"
REPORT = "report.json"


@dataclass(frozen=True)
class Folder:
    """Of a job.

    Attributes:
        job: whose it is.
        path: of the folder, which need not be there yet.
    """

    job: Job
    path: Path

    def check(self) -> None:
        """Raise ValueError if the folder was made for something else."""
        asked = self.path / ASKED
        if not asked.is_file():
            if (self.path / CONFIG_FILE).exists():
                raise ValueError(f"{self.path} holds a run that is not of an experiment; name another --output")
            return
        saved = parse_yaml(asked.read_text(encoding="utf-8"), str(asked))
        now = self.job.config
        differing = differences(saved, now)
        before = Config.from_dict(saved).data.ood
        if before != now.data.ood:  # which evaluation reads from the run
            differing.append(f"data.ood was {before} and is {now.data.ood}: add sets under 'evaluate' instead")
        if differing:
            raise ValueError(
                f"{self.path} was made by another configuration ({', '.join(differing)}); set it back, give the method "
                "another name, name another --output, or delete the folder"
            )

    def prepare(self) -> None:
        """Make the folder and say what it is for."""
        self.path.mkdir(parents=True, exist_ok=True)
        values = {**self.job.config.to_dict(), "output": str(self.path)}
        with replacing(self.path / ASKED) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    # ---- What has happened ------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """``trained``, ``evaluated`` (words, report's SHA-256), ``failed`` (why), ``attempts``."""
        try:
            record = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            record = {}
        except (OSError, ValueError) as problem:
            raise ValueError(f"{self.path / RECORD} cannot be read ({problem}); delete it") from None
        empty: dict[str, Any] = {"trained": False, "evaluated": None, "failed": None, "attempts": []}
        return {**empty, **record}

    def update(self, **changes: Any) -> None:
        """Change entries of the record."""
        with replacing(self.path / RECORD) as temporary:
            temporary.write_text(json.dumps({**self.record(), **changes}, indent=1) + "\n", encoding="utf-8")

    def is_trained(self) -> bool:
        """Whether training has come to its end."""
        return bool(self.record()["trained"])

    def set_evaluated(self, words: tuple[str, ...]) -> None:
        """Note that ``report.json`` is of this evaluation."""
        self.update(evaluated={"words": list(words), "report": self._report_hash()})

    def is_done(self, words: tuple[str, ...]) -> bool:
        """Whether ``report.json`` is there and of this evaluation, and nobody has evaluated otherwise since."""
        report = self._report_hash()
        return report is not None and self.record()["evaluated"] == {"words": list(words), "report": report}

    def _report_hash(self) -> str | None:
        try:
            return hashlib.sha256((self.path / REPORT).read_bytes()).hexdigest()
        except FileNotFoundError:
            return None

    def last_words(self, start: int = 0) -> str:
        """The error, or the last line, that the log holds from byte ``start`` on."""
        try:
            with open(self.path / LOG, "rb") as file:
                file.seek(max(start, file.seek(0, os.SEEK_END) - 10_000))
                lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        except FileNotFoundError:
            return ""
        errors = [line for line in lines if line.startswith("error")]
        return (errors or lines or [""])[-1]

    # ---- Whose it is ------------------------------------------------------------------------------------------

    def lock(self) -> int | None:
        """A file descriptor that holds the folder until it, and every copy a process inherits, is closed.

        None: somebody else has it.

        Raises:
            ValueError: the file system has no locks.
        """
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError as problem:
            os.close(handle)
            raise ValueError(
                f"{self.path / LOCK} cannot be locked ({problem}); name an --output on another disk"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{platform.node()}, process {os.getpid()}\n".encode(), 0)
        return handle

    def holder(self) -> str:
        """Who has the folder, in words."""
        try:
            return (self.path / LOCK).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return "another runner"
