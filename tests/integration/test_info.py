"""``python -m tal_fast.info``."""

from __future__ import annotations

import pytest
import torch

import tal_fast
from tal_fast import info
from tal_fast.utils.environment import version_of


def test_info_names_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    out = capsys.readouterr().out
    assert f"tal_fast {tal_fast.__version__}, Python" in out
    assert torch.__version__ in out
    assert "C++ extension:" in out
    assert "backend 'auto' on cpu:" in out
    assert "Triton kernels on cpu:" in out
    assert version_of("no-such-package") == "not installed"
