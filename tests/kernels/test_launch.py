"""Launches whose compiled kernel is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.host_time import Driver
from tal_fast.kernels import launch

LANGUAGE = [(scope, dict(vars(scope))) for scope in (tl, tl.core, tl.math, tl.tensor, tl.dtype)]
"""Members at import: the interpreter leaves some replaced once a kernel of another test has called a function."""


def copy(x_ptr, y_ptr, n, stride, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at * stride, mask=at < n), mask=at < n)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Driver that records launches."""
    found = Driver()
    found.launched = []
    monkeypatch.setattr(driver, "_active", found)
    for scope, members in LANGUAGE:
        for name, member in members.items():
            if vars(scope).get(name) is not member:
                monkeypatch.setattr(scope, name, member)
    return found


@pytest.fixture
def kernel(stand_in: Driver) -> Iterator[Any]:
    found: Any = JITFunction(copy)
    yield found
    for compiled_kernels, *_ in found.device_caches.values():
        for each in compiled_kernels.values():
            each.module = None  # which Triton would unload, by another driver


def test_the_kernel_kept_is_the_one_that_triton_chooses(stand_in: Driver, kernel: Any) -> None:
    """Whatever changes between launches: dtype, alignment, numbers, constants, device or order."""
    assert stand_in.launched is not None
    memory = {dtype: torch.zeros(64, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    plans = [
        launch.Launch(kernel, (2, 3)[:axes], (n, stride), {"BLOCK": block}, 1)
        for axes, n, stride, block in [(1, 16, 1, 16), (2, 16, 1, 16), (1, 15, 1, 16), (1, 16, 2, 16), (1, 16, 1, 8)]
    ]
    cases = [
        (plan, (memory[a][i:], memory[b][j:]))
        for plan, a, b, (i, j) in itertools.product(plans, memory, memory, [(0, 0), (1, 0), (0, 2)])
    ]
    for _ in range(3):
        for at in torch.randperm(len(cases)).tolist():
            plan, tensors = cases[at]
            kernel[plan.grid](*tensors, *plan.numbers, **plan.constants, num_warps=1)
            plan.run(*tensors)
            by_triton, by_plan = stand_in.launched[-2:]
            assert by_plan[:2] == by_triton[:2]  # the function, of which each compiled kernel has its own, and the grid
            assert all(a is b or a == b for a, b in zip(by_plan[2:], by_triton[2:], strict=True))
    assert len({call[0] for call in stand_in.launched}) > 20


def test_a_kernel_kept_is_launched_without_triton_s_dispatch(
    stand_in: Driver, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stand_in.launched is not None
    x = torch.zeros(64)
    plan = launch.Launch(kernel, (1,), (16, 1), {"BLOCK": 16}, 1)
    plan.run(x, x)
    monkeypatch.setattr(kernel, "run", None)
    plan.run(x, x)
    assert len(stand_in.launched) == 2
    with pytest.raises(TypeError):
        plan.run(x[1:], x)  # another kernel
    with pytest.raises(TypeError):
        plan.run(x.to("meta"), x)  # on another device


def test_plans_are_kept_until_forgotten() -> None:
    made: list[tuple[int, bool]] = []

    @launch.planner
    def plan(rows: int, flag: bool) -> launch.Launch:
        made.append((rows, flag))
        return launch.Launch(None, (rows,), (rows,), {}, 1)

    assert plan(3, True) is plan(3, True)
    assert plan(4, True).grid == (4,)
    assert plan(3, False) is not plan(3, True)
    assert made == [(3, True), (4, True), (3, False)]
    launch.forget_plans()
    plan(3, True)
    assert len(made) == 4
