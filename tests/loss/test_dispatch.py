"""Choice of the backend, and what is said where one is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tal_fast import TALLoss
from tal_fast.loss import _extension, dispatch
from tal_fast.loss.options import LossOptions
from tests.helpers.backends import DEVICE, NEEDS_EXTENSION, NEEDS_TRITON

CPU = torch.device("cpu")


def test_named_backend_serves() -> None:
    assert set(dispatch.NAMES) == {"auto", "reference", "native", "triton"}
    assert dispatch.for_device("reference", CPU).name == "reference"
    with pytest.raises(ValueError, match="backend is 'cuda'; use one of 'auto', 'reference', 'native', 'triton'"):
        dispatch.check_name("cuda")


@NEEDS_EXTENSION
def test_auto_takes_the_extension_on_cpus() -> None:
    assert dispatch.for_device("auto", CPU).name == "native"
    logits = torch.randn(2, 3)
    assert dispatch.runs_in_one_call("auto", logits, LossOptions())
    assert not dispatch.runs_in_one_call("auto", logits, LossOptions(inplace=True))
    assert not dispatch.runs_in_one_call("reference", logits, LossOptions())


@NEEDS_TRITON
def test_named_triton_serves() -> None:
    assert dispatch.for_device("triton", DEVICE).name == "triton"


@pytest.mark.parametrize("name", [pytest.param("native", marks=NEEDS_EXTENSION), "triton"])
def test_backend_that_does_not_run_on_a_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{name}' does not run on meta.*; use backend='auto'"):
        dispatch.for_device(name, torch.device("meta"))


def test_plain_pytorch_serves_on_a_gpu_without_triton_and_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "triton_problem", lambda device: "triton cannot be imported")
    _extension.warn_of_pytorch.cache_clear()
    with pytest.warns(UserWarning, match="do not run on cuda:3: triton cannot be imported. Plain PyTorch"):
        assert dispatch._choose.__wrapped__("auto", torch.device("cuda", 3)) == "reference"
    _extension.warn_of_pytorch.cache_clear()


def test_description_names_the_backend_of_auto() -> None:
    lines = dispatch.describe()
    assert lines[0].startswith("C++ extension: ")
    assert f"backend 'auto' on cpu: {dispatch.for_device('auto', CPU).name}" in lines


def test_missing_extension_is_named_with_the_command_that_builds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(_extension, "__file__", str(tmp_path / "loss" / "_extension.py"))
    usable, why = _extension.load.__wrapped__()
    assert not usable
    assert why.startswith("not built; run `pip install --no-build-isolation .`")
    (tmp_path / "_C.abi3.so").write_bytes(b"no library")
    usable, why = _extension.load.__wrapped__()
    assert not usable
    assert "_C.abi3.so does not load" in why


def test_without_the_extension_plain_pytorch_serves(tmp_path: Path) -> None:
    code = """
import warnings, torch
from tal_fast import TALLoss
torch.manual_seed(0)
z, f, y = torch.randn(8, 5), torch.rand(8, 6), torch.randint(5, (8,))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss_fn = TALLoss(queue_size=20)
    losses = [float(loss_fn(z, f, y)) for _ in range(3)]
ours = [str(w.message) for w in caught if "tal_fast" in str(w.message)]
print(len(ours), *losses)
assert "TAL_FAST_NO_EXTENSION" in ours[0]
"""
    env = {**os.environ, "TAL_FAST_NO_EXTENSION": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    count, *losses = done.stdout.split()
    assert count == "1"
    torch.manual_seed(0)
    z, f, y = torch.randn(8, 5), torch.rand(8, 6), torch.randint(5, (8,))
    loss_fn = TALLoss(queue_size=20)
    want = [float(loss_fn(z, f, y)) for _ in range(3)]
    assert [float(x) for x in losses] == pytest.approx(want, rel=1e-5)
