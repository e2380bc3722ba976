"""Disks that fail."""

from __future__ import annotations

import os
from typing import Any

import pytest


def fail_replacing(monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
    """Let every ``os.replace`` beyond the first ``after`` ones raise an error."""
    replace, done = os.replace, []

    def failing(source: Any, target: Any) -> None:
        if len(done) >= after:
            raise error
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
