"""Kernels as torch operators, and when they are available."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.kernels import AVAILABLE, DEVICE, LOSS_OPTIONS, NAN_WARNINGS, REASON, on_device
from tests.helpers.loss_cases import random_batch, random_queue

if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

from tal_fast import kernels
from tal_fast.kernels import ops

pytestmark = NAN_WARNINGS


def test_operators_keep_to_their_schemas() -> None:
    """Mutated arguments, shapes and dtypes of the fakes, and AOT dispatch, on which torch.compile relies."""
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    logits, features, labels = on_device(*random_batch(5, 7))
    queue = on_device(*random_queue(6))
    cursor = torch.tensor([3, 6], device=DEVICE)
    statistics = features, labels, *queue, cursor, None, -100
    torch.library.opcheck(ops.statistics_distance, statistics, test_utils=utils)
    mean, std, distance, batch, tickets = ops.statistics_distance(*statistics)
    sums = {"confidence_threshold": 0.0, "ignore_index": -100}
    torch.library.opcheck(ops.batch_sums, (logits, labels, distance, batch, tickets), sums, test_utils=utils)
    for dtype, need_grad in ((torch.float32, True), (torch.float16, True), (torch.float64, False)):
        arguments = logits.to(dtype), labels, distance, batch, tickets
        for reduction in ("mean", "none"):
            options = {**LOSS_OPTIONS, "need_grad": need_grad, "reduction": reduction}
            torch.library.opcheck(ops.loss_forward, arguments, options, test_utils=utils)
    for accepted in (torch.rand(5, device=DEVICE) < 0.5, None):
        torch.library.opcheck(ops.push, (*queue, cursor, mean, std, accepted), test_utils=utils)
    torch.library.opcheck(ops.nearest, (*queue, cursor, mean, std), test_utils=utils)


def test_availability_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.is_available(torch.device("cuda")) == (True, "")
    available, reason = kernels.is_available(torch.device("mps"))
    assert not available
    assert "mps" in reason
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    available, reason = kernels.is_available(torch.device("cpu"))
    assert not available
    assert "TRITON_INTERPRET=1" in reason


def test_package_is_imported_without_triton() -> None:
    code = """
import sys
import torch, tal_fast, tal_fast.kernels as kernels
assert "triton" not in sys.modules, "importing tal_fast imports triton"
sys.modules["triton"] = None
available, reason = kernels.is_available(torch.device("cuda"))
assert not available and "triton cannot be imported" in reason, reason
try:
    tal_fast.TALLoss(backend="triton")(torch.randn(2, 3), torch.rand(2, 4), torch.tensor([0, 1]))
except ValueError as error:
    assert "triton cannot be imported" in str(error), error
else:
    raise AssertionError("backend='triton' ran without triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
