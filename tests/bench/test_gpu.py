"""Benchmarks on a GPU: exit status, budgets, a lost CUDA context, and the summary."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compile_ahead, gpu, gpu_summary, harness, host_time
from tal_fast import kernels
from tal_fast.kernels import launch
from tal_fast.loss.backends import TritonBackend
from tests.helpers.kernels import NAN_WARNINGS

available, reason = kernels.is_available(torch.device("cpu"))
if not available:
    pytest.skip(reason, allow_module_level=True)

pytestmark = NAN_WARNINGS  # of rows beyond the batch, which fill a tile
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke() -> gpu.Bench:
    return gpu.Bench(smoke=True)


def loss_part(bench: gpu.Bench, names: tuple[str, ...] = gpu.OURS) -> gpu.Part:
    return gpu.Part("loss", 60, lambda r: gpu.loss(bench, names, 2, 10, torch.float32, r))


def run_main(monkeypatch: pytest.MonkeyPatch, smoke: gpu.Bench, out: Path, *parts: gpu.Part) -> int:
    """Exit status of the command with these parts."""
    monkeypatch.setattr(gpu, "Bench", lambda on: smoke)
    monkeypatch.setattr(gpu, "parts", lambda bench, only: list(parts))
    with pytest.raises(SystemExit) as end:
        gpu.main(["--smoke", "--out", str(out)])
    return int(end.value.code or 0)


def test_a_wrong_loss_kernel_makes_the_exit_status_1(
    monkeypatch: pytest.MonkeyPatch, smoke: gpu.Bench, tmp_path: Path
) -> None:
    out = tmp_path / "gpu.json"
    assert run_main(monkeypatch, smoke, out, loss_part(smoke)) == 0
    forward = TritonBackend.forward

    def wrong(self: TritonBackend, *args: Any, **kwargs: Any) -> Any:
        loss, grad, stats = forward(self, *args, **kwargs)
        grad[1, 3] += 0.1
        return loss, grad, stats

    monkeypatch.setattr(TritonBackend, "forward", wrong)
    assert run_main(monkeypatch, smoke, out, loss_part(smoke)) == 1
    (r,) = json.loads(out.read_text())["loss"]
    assert "gradient of kernel is off" in r["failed"]
    assert "gradient of kernel_released is off" in r["failed"]


def test_a_peer_that_fails_costs_neither_the_others_nor_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, smoke: gpu.Bench, tmp_path: Path
) -> None:
    def fails(*_: object) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(gpu.bench_loss, "cross_entropy", fails)
    out = tmp_path / "gpu.json"
    assert run_main(monkeypatch, smoke, out, loss_part(smoke, ("cross_entropy", "liger", "kernel"))) == 0
    (r,) = json.loads(out.read_text())["loss"]
    assert r["peers"]["cross_entropy"]["failed"] == "RuntimeError: no such thing"
    assert "runs on GPUs only" in r["peers"]["liger"]["skipped"]
    assert r["peers"]["kernel"]["p20_ms"] > 0


def test_a_part_beyond_its_budget_keeps_what_it_measured() -> None:
    def slow(r: dict[str, Any]) -> None:
        r["first"] = 1
        try:
            time.sleep(30)
        except Exception:  # a peer's handler does not take the end of the budget
            time.sleep(30)
        r["second"] = 2

    before = time.monotonic()
    r = gpu.run_part(gpu.Part("loss", 0.1, slow), left=100)
    assert {"first", "failed"} < set(r)
    assert "longer than its" in r["failed"]
    r = gpu.run_part(gpu.Part("loss", 50, slow), left=0.1)
    assert "no time left" in r["skipped"]
    assert "failed" not in r
    assert gpu.run_part(gpu.Part("loss", 50, slow), left=-1) == {"skipped": "no time left"}
    assert time.monotonic() - before < 20


def test_a_lost_cuda_context_starts_the_process_anew_with_the_next_part(
    monkeypatch: pytest.MonkeyPatch, smoke: gpu.Bench, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    def execv(_: str, command: list[str]) -> None:
        started.append(command)
        raise SystemExit(7)

    def measure(r: dict[str, Any]) -> None:
        r["measured"] = True

    def lose(r: dict[str, Any]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    parts = [gpu.Part("step", 9, lose), gpu.Part("step", 9, measure), gpu.Part("loss", 9, measure)]
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(gpu.os, "execv", execv)
    monkeypatch.setattr(gpu, "context_is_lost", lambda device: True)
    assert run_main(monkeypatch, smoke, out, *parts) == 7
    monkeypatch.setattr(gpu, "context_is_lost", lambda device: False)
    with pytest.raises(SystemExit) as end:
        gpu.main(started[0][3:])
    assert end.value.code == 1  # of the part before
    result = json.loads(out.read_text())
    assert [("failed" in r, "measured" in r) for r in result["step"]] == [(True, False), (False, True)]
    assert len(result["loss"]) == 1


def test_recorded_launches_are_those_of_the_call_and_run_unless_replaced(smoke: gpu.Bench, poison: object) -> None:
    p = gpu.bench_loss.Problem(4, 10, torch.float32, smoke.device)
    run = gpu.backend_alone("kernel_released", p)
    want = run(p.logits)[1].clone()
    assert want.isfinite().all()
    launches = harness.kernels_launched(lambda: run(p.logits))
    assert len(launches) == 2
    assert launches[-1].kernel.fn.__name__ == "loss_kernel"
    with launch.replaced(lambda launch: None):
        assert run(p.logits)[1].isnan().all()
    assert torch.equal(run(p.logits)[1], want)


@pytest.mark.slow  # compiles for an H100
def test_host_time_needs_no_gpu() -> None:
    command = [sys.executable, "-m", "bench.host_time", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ") for line in done.stdout.splitlines())
    assert list(lines) == ["paper", "released"]
    for line in lines.values():
        ways = [entry.rsplit(" ", 2) for entry in line.split(", ")]
        assert [way for way, _, _ in ways] == [w + e for w in host_time.WAYS for e in ("", " without launches")]
        assert all(float(us) > 0 for _, us, _ in ways)


def timed(milliseconds: float, share: float) -> dict[str, float]:
    return {"p20_ms": milliseconds, "share_of_copy": share}


def test_summary_names_what_falls_short_in_15_lines() -> None:
    step = {
        "peer": "paper", "B": 256, "C": 1000, "D": 2048, "N": 880_880, "dtype": "float32", "graph": {"p20_ms": 0.175},
        "kernels_us": [["search_kernel", 140.0], ["loss_kernel", 20.0], ["push_kernel", 4.0]], "host_us": 88.0,
    }  # fmt: skip
    shapes = [(16_384, 1000, 0.19), (4096, 21_841, 0.78), (65_536, 100, 0.7), (256, 1000, 0.01)]
    losses = [
        {"B": b, "C": c, "dtype": "bfloat16", "bytes": 4 * b * c, "peers": {"kernel": timed(0.1, share)}}
        for b, c, share in shapes
    ]
    search = {"B": 256, "D": 2048, "N": 880_880, "p20_ms": 0.14, "floor_ms": 0.045}
    result = {
        "machine_info": {"gpu": "H100", "cpu": "", "torch": "2.11", "triton": "3.6", "commit": "abc"},
        "copy_GB_per_s": 3000.0, "float32_GFLOP_per_s": 5e4, "search": [search, {"skipped": "no time left"}],
        "step": [step] * 9, "loss": losses + [{"failed": "AssertionError: it is off"}] * 20,
    }  # fmt: skip
    found = gpu_summary.lines(result)
    assert len(found) <= 15
    assert found[1] == (
        "step paper 256 x 1,000 x 2,048 x 880,880 float32: 175.0 us, host 88; search 140.0, loss 20.0, push 4.0, "
        "the rest 11.0"
    )
    text = "\n".join(found)
    assert "FAILED: 20 parts; the first, loss: AssertionError: it is off" in text
    assert "search_kernel, 140 of the 175 us of step paper" in found[-1]
    assert "16,384 x 1,000 bfloat16 at 19% of copy" in found[-1]
    assert "65,536 x 100 bfloat16 at 70%" in found[-1]
    assert "21,841" not in found[-1]  # its goal is met
    assert "256 x 1,000 bfloat16" not in found[-1]  # too small for a share to tell
    assert "search 256 x 2,048 x 880,880 at 3.1 of its floor" in found[-1]
    assert (
        gpu_summary.lines({**result, "step": [], "loss": [], "search": []})[-1]
        == "tune next: nothing was measured on a GPU"
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--smok"], "--smok is no option of bench/gpu.sh"),
        (["--tests", "never"], "--tests is never; use first, last, none or only"),
        (["--smoke", "--only", "los"], "--only is 'los'; name some of step, loss, search, training, peers"),
    ],
)
def test_unknown_options_are_refused_in_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    done = subprocess.run(["bench/gpu.sh", *arguments], cwd=ROOT, capture_output=True, text=True, env=environ)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_kernels_compiled_ahead_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same kernels, constants and grids; nothing runs. Values of tensors do not matter to a compilation."""
    seen: list[tuple[Any, ...]] = []

    class Warmed:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def warmup(self, *arguments: Any, grid: tuple[int, ...], **options: Any) -> None:
            seen.append((self.kernel.fn.__name__, grid, len(arguments), options))

    original = compile_ahead.compile_only
    monkeypatch.setattr(
        compile_ahead, "compile_only", lambda each: original(dataclasses.replace(each, kernel=Warmed(each.kernel)))
    )
    sizes, device = (4, 10, 16, 50), torch.device("cpu")
    job = partial(compile_ahead.step_job, "released", sizes, torch.bfloat16, torch.bfloat16, "cpu")
    assert compile_ahead.work(job) is None
    step = gpu.bench_step.make_step(gpu.bench_step.Case("released", *sizes, "bfloat16"), device, backend="triton")
    leaf = torch.rand(4, 10, dtype=torch.bfloat16).requires_grad_()
    ran = harness.kernels_launched(lambda: step(leaf, torch.rand(4, 16).bfloat16(), torch.zeros(4, dtype=torch.int64)))
    assert seen == [(e.kernel.fn.__name__, e.grid, len(e.arguments), {**e.constants, **e.options}) for e in ran]
    assert "no kernel here" in str(compile_ahead.work(partial(fail, "no kernel here")))


def fail(text: str) -> None:
    raise ValueError(text)


def test_jobs_are_compiled_in_other_processes() -> None:
    assert compile_ahead.compile_all([partial(int, "7"), partial(int, "seven")]) == [
        None, "ValueError: invalid literal for int() with base 10: 'seven'",
    ]  # fmt: skip
