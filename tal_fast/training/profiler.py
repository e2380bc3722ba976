"""A window of steps recorded by torch.profiler, as a Chrome trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tal_fast.utils.io import replacing


class Profiler:
    """Records steps ``start`` to ``stop - 1``, counted from the first one of this process.

    Args:
        start, stop: the window; an empty one records nothing.
        path: of the trace; chrome://tracing and ui.perfetto.dev show it.
    """

    def __init__(self, start: int, stop: int, path: Path) -> None:
        self._start, self._stop = start, stop
        self._path = path
        self._step = 0
        self._profile: Any = None

    def before_step(self) -> None:
        """Called before each step."""
        if self._step == self._start < self._stop:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profile = torch.profiler.profile(activities=activities, record_shapes=True)
            self._profile.__enter__()

    def after_step(self) -> Path | None:
        """Called after each step; the trace's path after the window's last one."""
        self._step += 1
        return self.close() if self._step == self._stop else None

    def close(self) -> Path | None:
        """Write what was recorded, if a recording is on."""
        profile, self._profile = self._profile, None
        if profile is None:
            return None
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        profile.__exit__(None, None, None)
        with replacing(self._path) as temporary:
            profile.export_chrome_trace(str(temporary))
        return self._path
