"""pytest-benchmark plugin: a floor timed in turns, the machine's limits, and result files small enough to commit.

``make bench`` runs every part and writes bench/results/. By hand::

    python -m pytest bench --benchmark-only --size smoke                              seconds
    python -m pytest bench/bench_loss.py --benchmark-only --benchmark-json=FILE -k C1000     one part, or less
    python -m pytest bench --benchmark-disable                                        only the gates
    python -m pytest bench --benchmark-only --device cuda                             by CUDA graph replay, on a GPU
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness import (
    BLOCK,
    CannotRun,
    GraphTimer,
    clock,
    clock_of,
    environment,
    limits,
    percentiles,
    ratio_to_floor,
    threads_set_to,
)

SECONDS = 0.5
"""Seconds spent on the runs of one benchmark (at most 1,000 runs)."""

FEWEST = 3
"""Least number of runs of a benchmark, and of its floor within a turn."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tal-fast benchmarks")
    group.addoption("--size", choices=("smoke", "full"), default="full", help="which sizes to run")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")


ENVIRONMENT = pytest.StashKey[dict[str, Any]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ENVIRONMENT] = environment()  # of the start: by the end the working tree may have changed


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize a benchmark's ``case`` with the cases of its mark."""
    mark = metafunc.definition.get_closest_marker("cases")
    if mark is None:
        return
    full, smoke = mark.args
    cases = smoke if metafunc.config.getoption("size") == "smoke" else full
    on_gpu = metafunc.config.getoption("device") == "cuda"
    if on_gpu and metafunc.config.getoption("size") == "full":
        cases = mark.kwargs.get("gpu", ())
    parameters = []
    for case in cases:
        timer = time.perf_counter if on_gpu else clock_of(threads_of(case))
        parameters.append(pytest.param(case, marks=pytest.mark.benchmark(group=mark.kwargs["group"], timer=timer)))
    metafunc.parametrize("case", parameters, ids=str)


def threads_of(case: Any) -> int:
    return getattr(case, "threads", 1)


def runs_in(seconds: float, once: float, most: int) -> int:
    """Number of runs that fit into the time, between ``FEWEST`` and ``most``."""
    return max(FEWEST, min(most, math.ceil(seconds / once)))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return torch.device(pytestconfig.getoption("device"))


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """Timer of a peer that has passed its gate; see ``Measure.__call__``."""
    return Measure(benchmark, device)


class Measure:
    """Timer of one benchmark: the peer's runs in turns with its floor's."""

    def __init__(self, benchmark: Any, device: torch.device) -> None:
        self.benchmark, self.device = benchmark, device

    def __call__(
        self,
        calls: list[Callable[[], object]],
        floor: Callable[[], object],
        *,
        case: Any,
        facts: dict[str, Any],
        prepare: Callable[[], object] | None = None,
        rounds: int | None = None,
    ) -> None:
        """Time one peer.

        Args:
            calls: the same work on different sets of inputs. On the CPU there is one set.
            floor: the least that any implementation has to do, or what the peer is measured against.
            case: what the benchmark was called with; its fields go into the result file, its ``threads`` (1 if it has
                none) are PyTorch's.
            facts: what else describes the work, for the result file; ``bytes`` and ``operations`` of one call also as
                shares of what the machine can do.
            prepare: made before each run, untimed.
            rounds: exactly so many runs, instead of as many as fit into the time.
        """
        if self.benchmark.disabled:
            (prepare or (lambda: None))()
            self.benchmark(calls[0])
            return
        threads = threads_of(case)
        timer = clock_of(threads)
        with threads_set_to(threads):
            limit = limits(self.device, threads)
            ratio: dict[str, float] = {}
            if self.device.type == "cuda":
                seconds = self._on_gpu(calls, floor)
            else:
                seconds, ratio = self._on_cpu(calls[0], floor, prepare, rounds, timer)
        clock_name = "CPU time" if timer is time.thread_time else "wall"
        info: dict[str, Any] = {**case.__dict__, **facts, "threads": threads, "clock": clock_name}
        info |= {**percentiles(seconds), **ratio}
        info["mean_ms"] = sum(seconds) / len(seconds) * 1e3
        p20 = info["p20_ms"] / 1e3
        if "bytes" in facts:
            info["share_of_copy"] = facts["bytes"] / p20 / limit["copy_bytes_per_s"]
        if "operations" in facts:
            info["share_of_arithmetic"] = facts["operations"] / p20 / limit["flop_per_s"]
        info["load"] = os.getloadavg()[0]
        self.benchmark.extra_info.update(info)

    def _on_cpu(
        self,
        run: Callable[[], object],
        floor: Callable[[], object],
        prepare: Callable[[], object] | None,
        rounds: int | None,
        timer: Callable[[], float],
    ) -> tuple[list[float], dict[str, float]]:
        prepare = prepare or (lambda: None)
        prepare()
        once = clock(run, 1, timer)[0]
        if once < 0.1:
            once = min(clock(run, 5, timer))
        if rounds is None:
            rounds = runs_in(SECONDS, once, 1000)
        floor_runs = runs_in(SECONDS / 10, clock(floor, 1, timer)[0], BLOCK)
        floors: list[list[float]] = []
        count = 0

        def setup() -> None:
            nonlocal count
            if count % BLOCK == 0:
                floors.append(clock(floor, floor_runs, timer))
            count += 1
            prepare()

        self.benchmark.pedantic(run, setup=setup, rounds=rounds)
        floors.append(clock(floor, floor_runs, timer))
        seconds = list(self.benchmark.stats.stats.data)
        floor_times = percentiles([t for block in floors for t in block])
        return seconds, {"floor_p20_ms": floor_times["p20_ms"], **ratio_to_floor(seconds, floors)}

    def _on_gpu(self, calls: list[Callable[[], object]], floor: Callable[[], object]) -> list[float]:
        timer = GraphTimer(self.device)
        seconds = timer(calls)
        self.benchmark.extra_info["floor_p20_ms"] = percentiles(timer([floor] * len(calls)))["p20_ms"]

        def all_of_them() -> None:
            for call in calls:
                call()
            torch.cuda.synchronize()

        self.benchmark.pedantic(all_of_them, rounds=10)  # pytest-benchmark's own table: with the launches from Python
        return seconds


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Skip a peer that is not installed or not made for a size, with the reason."""
    outcome = yield
    if outcome.excinfo is not None and issubclass(outcome.excinfo[0], CannotRun):
        outcome.force_exception(pytest.skip.Exception(str(outcome.excinfo[1])))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # a host's name is nobody's business
    machine_info.update(config.stash[ENVIRONMENT])


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Reduce the result file to what ``bench.report`` and ``bench.compare`` read."""
    session = config.pluginmanager.get_plugin("session")
    failed = session.testsfailed if session is not None else 0
    where = torch.device(config.getoption("device"))
    counts = sorted({b["extra_info"]["threads"] for b in output_json["benchmarks"]})
    kept = {
        "what": f"benchmarks on the {where.type}, size {config.getoption('size')}",
        "failed": failed,
        "machine_info": output_json["machine_info"],
        "limits": [limits(where, threads) for threads in counts],
        "benchmarks": [
            {"group": b["group"], "name": b["name"], **{k: _short(v) for k, v in b["extra_info"].items()}}
            for b in output_json["benchmarks"]
        ],
    }
    output_json.clear()
    output_json.update(kept)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
