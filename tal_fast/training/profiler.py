"""Chrome trace of a window of training steps, recorded by torch.profiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tal_fast.utils.io import replacing


class Profiler:
    """Profiler of the steps ``start`` to ``stop - 1`` of this process."""

    def __init__(self, start: int, stop: int, path: Path) -> None:
        self._start, self._stop = start, stop
        self._path = path
        self._step = 0
        self._profile: Any = None

    def before_step(self) -> None:
        """Start recording before the first step of the window; called before each step."""
        if self._step == self._start < self._stop:
            self._profile = torch.profiler.profile(record_shapes=True)
            self._profile.__enter__()

    def after_step(self) -> Path | None:
        """Write the trace after the last step of the window and return its path; called after each step."""
        self._step += 1
        return self.close() if self._step == self._stop else None

    def close(self) -> Path | None:
        """Write the trace if a recording is on, and return its path."""
        profile, self._profile = self._profile, None
        if profile is None:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile.__exit__(None, None, None)
        with replacing(self._path) as temporary:
            profile.export_chrome_trace(str(temporary))
        return self._path
