"""Benchmark suite: peers against golden data, correctness gates, comparison and report."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import bench_linear, bench_loss, bench_queue, bench_step, compare, harness
from bench.batches import FreshFeatures, statistics
from bench.list_queue import ListQueueTAL
from bench.report import cpu_tables, figures, gpu_tables, limits, pages
from bench.report.results import RESULTS, Results
from bench.report.text import ms
from tests.helpers.loss_cases import CASES, golden, relative, trace

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("case", CASES)
def test_list_queue_matches_the_golden_data(case: str) -> None:
    g = golden(case)
    step = ListQueueTAL(int(g["capacity"]), *(float(g[k]) for k in ("t_min", "t_max", "t_wrong")))
    step.means, step.stds = g["queue_mean"].tolist(), g["queue_std"].tolist()
    logits = g["logits"].double().requires_grad_()
    loss = step(logits, g["features"].double(), g["labels"], warmup=bool(g["warmup"]))
    loss.backward()
    assert relative(loss, g["released/loss"]) <= 1e-12
    assert logits.grad is not None
    assert relative(logits.grad, g["released/grad"]) <= 1e-7
    torch.testing.assert_close(torch.tensor(step.means), g["queue_mean_after"].float(), rtol=1e-6, atol=0)


def test_list_queue_matches_the_golden_trace() -> None:
    t = trace()
    step = ListQueueTAL(int(t["capacity"]))
    for i in range(len(t["logits"])):
        loss = step(
            t["logits"][i].double(), t["features"][i].double(), t["labels"][i], warmup=i < int(t["warmup_steps"])
        )
        assert relative(loss, t["loss_released"][i]) <= 1e-12
        assert len(step.means) == int(t["queue_len"][i])


def test_renewed_features_keep_their_memory_and_match_the_queue_in_distribution() -> None:
    fresh = FreshFeatures(4096, 256, torch.device("cpu"))
    features, before = fresh.features, fresh.features.mean(1)
    fresh.renew()
    assert fresh.features is features
    assert (features.mean(1) - before).abs().median() > 0.01
    mean, std = statistics(100_000)
    for got, want in ((features.mean(1), mean), (features.std(1), std)):
        assert abs(got.mean() - want.mean()) < 0.02
        assert abs(got.std() - want.std()) < 0.02


def test_percentiles_are_in_milliseconds() -> None:
    assert harness.percentiles([x / 1e3 for x in range(11)]) == {
        "p20_ms": pytest.approx(2.0), "p50_ms": pytest.approx(5.0), "p80_ms": pytest.approx(8.0), "repeats": 11,
    }  # fmt: skip


def test_ratio_to_floor_does_not_change_with_load() -> None:
    """The machine is half as fast from the middle on: seconds double, the ratio stays."""
    load = np.repeat([1.0, 2.0], 10)
    seconds = (3.0 * np.repeat(load, harness.BLOCK)).tolist()
    floor = [[x] * harness.BLOCK for x in [*load, 2.0]]
    ratio = harness.ratio_to_floor(seconds, floor)
    assert ratio["ratio"] == ratio["ratio_low"] == ratio["ratio_high"] == 3.0


def test_ratio_interval_widens_with_noise() -> None:
    noise = np.random.default_rng(1).normal(3.0, 1.0, 400).clip(0.1)
    ratio = harness.ratio_to_floor(noise.tolist(), [[1.0] * harness.BLOCK] * 41)
    assert ratio["ratio_low"] < 3.0 < ratio["ratio_high"]
    assert 0.05 < ratio["ratio_high"] - ratio["ratio_low"] < 1.0


def test_ratio_of_an_incomplete_last_block() -> None:
    assert harness.ratio_to_floor([4.0] * 13, [[2.0]] * 3)["ratio"] == 2.0


def test_gate_refuses_a_wrong_loss_and_a_wrong_gradient() -> None:
    p = bench_loss.Problem(16, 10, torch.float32, torch.device("cpu"))
    run, variant = bench_loss.make_peer("paper", p)
    bench_loss.gate("it", run, p, variant)
    with pytest.raises(AssertionError, match="the loss of it is off"):
        bench_loss.gate("it", lambda z: (run(z)[0] * 1.001, run(z)[1]), p, variant)
    with pytest.raises(AssertionError, match="the gradient of it is off"):
        bench_loss.gate("it", lambda z: (run(z)[0], -run(z)[1]), p, variant)


@pytest.mark.parametrize("layer", [False, True])
@pytest.mark.parametrize("peer", [*bench_step.EAGER, *bench_step.DIRECT])
def test_gate_accepts_each_step_and_refuses_a_wrong_one(peer: str, layer: bool) -> None:
    case = bench_step.Case(peer, 32, 10, 16, 500, layer=layer)
    device = torch.device("cpu")
    torch.manual_seed(0)
    bench_step.gate(case, bench_step.make_step(case, device), device)
    wrong = bench_step.make_step(case, device)
    with pytest.raises(AssertionError, match="off by"):
        bench_step.gate(case, lambda z, f, y: wrong(z, 0.5 * f, y), device)


@pytest.mark.parametrize("peer", bench_linear.PEERS)
def test_gate_accepts_each_fused_layer_and_refuses_a_wrong_one(peer: str) -> None:
    case = bench_linear.Case(peer, 32, 100, 16)
    p = bench_linear.Problem(case, torch.device("cpu"))
    try:
        run = bench_linear.make_run(peer, p)
    except harness.CannotRun as reason:
        pytest.skip(str(reason))
    bench_linear.gate(case, run, p)
    with pytest.raises(AssertionError, match="the gradient by the bias of .* is off by"):
        bench_linear.gate(case, lambda: (*run()[:3], 1.1 * run()[3]), p)


@pytest.mark.parametrize("peer", bench_queue.PEERS)
def test_queue_peers_hold_the_same_window(peer: str) -> None:
    """Distances equal brute force after more pushes than the queue holds."""
    if peer == "faiss_flat":
        pytest.importorskip("faiss")
    if peer == "ckdtree":
        pytest.importorskip("scipy")
    from tal_fast import FeatureQueue

    source = bench_queue.Source("drifting")
    peer_queue, plain = FeatureQueue(5000), FeatureQueue(5000, backend="reference")
    first = source(5000)
    peer_queue.push(*first)
    plain.push(*first)
    step = bench_queue.make_peer(peer, peer_queue)
    for _ in range(60):
        batch = source(100)
        want = plain.nearest(*batch)
        plain.push(*batch)
        torch.testing.assert_close(step(*batch).float(), want, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", bench_queue.DISTRIBUTIONS)
def test_distributions_match_their_names(name: str) -> None:
    mean, std = bench_queue.Source(name)(10_000)
    assert mean.isfinite().all()
    assert std.isfinite().all()
    assert (mean.unique().numel() == 1) == (name in ("equal", "equal_means"))
    assert (std.unique().numel() == 1) == (name == "equal")
    assert (mean.max() > 1e5) == (name == "outlier")
    assert bool((std == mean / 2).all()) == (name in ("collinear", "equal"))


def result(ratio: float, spread: float = 0.05, peer: str = "paper") -> dict[str, Any]:
    ratios = {"ratio": ratio, "ratio_low": ratio - spread, "ratio_high": ratio + spread}
    return {"failed": 0, "benchmarks": [{"name": f"it-{peer}", "peer": peer, **ratios}]}


def test_compare_flags_ratios_beyond_tolerance_and_noise() -> None:
    def verdict(old: dict[str, Any], new: dict[str, Any]) -> tuple[bool, bool]:
        (change,) = compare.changes(old, new, 0.1)
        return change.slower, change.faster

    assert verdict(result(2.0), result(2.5)) == (True, False)
    assert verdict(result(2.5), result(2.0)) == (False, True)
    assert verdict(result(2.0), result(2.15)) == (False, False)  # within the tolerance
    assert verdict(result(2.0, 0.4), result(2.5, 0.4)) == (False, False)  # the intervals overlap
    assert compare.changes(result(2.0, peer="list_queue"), result(9.0, peer="list_queue"), 0.1) == []


def test_compare_exit_codes(tmp_path: Path) -> None:
    def run(old: object, new: object) -> tuple[int, str]:
        for name, content in (("old", old), ("new", new)):
            (tmp_path / name).write_text(json.dumps(content))
        command = [sys.executable, "-m", "bench.compare", str(tmp_path / "old"), str(tmp_path / "new")]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    assert run(result(2.0), result(2.0))[0] == 0
    code, text = run(result(2.0), result(3.0))
    assert code == 1
    assert "SLOWER" in text
    code, text = run(result(2.0), {**result(2.0), "failed": 2})
    assert code == 2
    assert "2 failed benchmarks" in text
    assert run(result(2.0), result(2.0, peer="reference"))[0] == 2
    assert run({"other": 1}, result(2.0))[0] == 2


def test_compare_selects_the_file_of_the_same_vector_instructions(tmp_path: Path) -> None:
    def run(vectors: str) -> tuple[int, str]:
        new = tmp_path / "new.json"
        new.write_text(json.dumps(result(3.0) | {"machine_info": {"vectors": vectors}}))
        command = [sys.executable, "-m", "bench.compare", str(tmp_path), str(new)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout

    (tmp_path / "AVX2.json").write_text(json.dumps(result(3.0)))
    (tmp_path / "AVX-512.json").write_text(json.dumps(result(1.5)))
    assert run("AVX2")[0] == 0
    assert run("AVX-512")[0] == 1
    code, text = run("NEON")
    assert code == 0
    assert "not judged" in text


@pytest.fixture(scope="module")
def cpu() -> Results:
    return Results.read(RESULTS / "cpu")


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda p: p.name)
def test_pages_match_the_committed_results(page: Path, cpu: Results) -> None:
    gpu_file = RESULTS / "gpu.json"
    gpu = json.loads(gpu_file.read_text()) if gpu_file.exists() else None
    text = page.read_text()
    assert "<!-- bench:" in text
    assert pages.fill_in(text, cpu, gpu) == text


def test_filling_in_a_page_follows_the_results_and_is_idempotent(cpu: Results) -> None:
    changed = copy.deepcopy(cpu)
    for row in changed.find("step", peer="list_queue"):
        row["p20_ms"] *= 2
    text = (ROOT / "README.md").read_text()
    once = pages.fill_in(text, changed, None)
    assert once != text
    assert pages.fill_in(once, changed, None) == once


def test_gpu_table_lists_timed_skipped_and_failed_peers(cpu: Results) -> None:
    timed = {"p20_ms": 0.024, "GB_per_s": 2730.0, "share_of_copy": 0.91}
    peers = {"paper": timed, "quack": {"skipped": "quack is not installed"}, "liger": {"failed": "RuntimeError: no"}}
    found = {"loss": [{"B": 16_384, "C": 1000, "dtype": "bfloat16", "peers": peers}, {"failed": "out of memory"}]}
    text = pages.fill_in("<!-- bench:gpu -->\n<!-- /bench -->", cpu, found)
    assert "| 16,384 x 1,000 | bfloat16 | 24.0 µs, 91% | quack is not installed | RuntimeError: no |" in text
    assert "Not yet run" in pages.fill_in("<!-- bench:gpu -->\n<!-- /bench -->", cpu, None)


def test_gpu_tables_compare_what_was_measured_before_and_now(cpu: Results) -> None:
    before = json.loads((RESULTS / "kernels" / "h200_before.json").read_text())
    first, missing = before["loss"][:2]
    half = {**first, "peers": {"kernel": {"p20_ms": first["p20_ms"] / 2}}}
    failed = {**missing, "peers": {"kernel": {"failed": "out of memory"}}}
    text = pages.fill_in("<!-- bench:gpu-before -->\n<!-- /bench -->", cpu, {"loss": [half, failed]})
    (row,) = [line for line in text.splitlines() if line.startswith("| loss")]
    assert f"{first['B']:,} x {first['C']:,}, {first['dtype']}" in row
    assert "| 2.0x |" in row


@pytest.mark.parametrize(("step_ms", "share", "met"), [(0.059, 0.86, "yes"), (0.061, 0.84, "**no**")])
def test_gpu_targets_are_judged(step_ms: float, share: float, met: str) -> None:
    size = {"B": 256, "C": 1000, "D": 2048, "N": 880_880, "dtype": "float32"}
    step = {"peer": "paper", **size, "graph": {"p20_ms": step_ms}}
    kernel = {"p20_ms": 0.03, "share_of_copy": share, "GB_per_s": 2500.0}
    loss = {"B": 16_384, "C": 1000, "dtype": "bfloat16", "peers": {"kernel": kernel}}
    rows = gpu_tables.gpu_targets_table({"step": [step], "loss": [loss]}).splitlines()[2:]
    assert len(rows) == 2
    assert all(row.endswith(f"| {met} |") for row in rows)


def test_wall_clock_figures_under_load_are_withheld(cpu: Results) -> None:
    files = copy.deepcopy(cpu.files)
    for file in files:
        for row in file["benchmarks"]:
            row["load"] = 50.0 if row["clock"] == "wall" else row["load"]
    busy = Results(files)
    assert busy.withheld > 0
    assert not busy.find("step", threads=2)
    assert busy.find("step", threads=1) == cpu.find("step", threads=1)
    assert "withheld" in cpu_tables.source(busy)
    assert "not measured" in limits.targets_table(busy)


def test_missing_results_are_reported_in_the_page() -> None:
    text = pages.fill_in("<!-- bench:loss -->\n<!-- /bench -->", Results([]), None)
    assert "Not measured yet" in text


def test_unknown_tables_are_refused(cpu: Results) -> None:
    with pytest.raises(ValueError, match="there is no table 'nonsense'"):
        pages.fill_in("<!-- bench:nonsense -->\n<!-- /bench -->", cpu, None)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (0.0456, "45.6 µs"), (0.2, "200 µs"), (0.00123, "1.23 µs"), (1.5, "1.50 ms"), (99.96, "100 ms"),
        (782.1, "782 ms"), (2345.0, "2.35 s"),
    ],
)  # fmt: skip
def test_milliseconds_as_text(value: float | None, text: str) -> None:
    assert ms(value) == text


def test_plots_are_drawn(cpu: Results, tmp_path: Path) -> None:
    figures.plot(cpu, tmp_path)
    for name in ("loss", "typicalness", "queue"):
        assert (figures.FIGURES / f"{name}.svg").exists() == (tmp_path / f"{name}.svg").exists() == bool(cpu.find(name))
        assert not cpu.find(name) or "tal_fast" in (tmp_path / f"{name}.svg").read_text()
    picture = tmp_path / "loss.svg"
    for changed, kept in ((r"\1.\g<2>9", True), (r"1\1.\2", False)):  # of one number: the last digit, the first
        before = re.sub(r"(\d+)\.(\d{5})\d\b", changed, picture.read_text(), count=1)
        picture.write_text(before)
        figures.plot(cpu, tmp_path)
        assert (picture.read_text() == before) == kept


@pytest.mark.gpu
def test_graph_timer_agrees_with_a_copys_bandwidth() -> None:
    device = torch.device("cuda")
    once, twice = harness.copy_bandwidth(device, 512), harness.copy_bandwidth(device, 1024)
    assert 0.8 < once / twice < 1.25
    assert 1e11 < twice < 2e13
    assert (
        harness.sets_beyond_cache(device, 1 << 20) * (1 << 20) > 2 * torch.cuda.get_device_properties(0).L2_cache_size
    )


@pytest.mark.slow
def test_suite_runs_and_writes_its_results(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "pytest", "bench/bench_loss.py", "bench/bench_queue.py", "--benchmark-only", "-q"]
    # Not a worker of pytest-xdist's, as this process may be: benchmarks are off there.
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--size", "smoke", "-k", "C100 or index", f"--benchmark-json={out}", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = compare.load(out)
    assert {"cpu", "torch", "commit", "load"} <= set(found["machine_info"])
    assert found["limits"][0]["copy_bytes_per_s"] > 1e8
    row = next(b for b in found["benchmarks"] if b["name"].startswith("bench_loss[paper-B128-C100-"))
    assert row["bytes"] == 2 * 128 * 100 * 4
    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["bench.loaders", "bench.metrics"])
def test_loader_and_metric_benchmarks_run(command: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", command, "--smoke", "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert {"cpu", "torch", "commit"} <= set(result["environment"])
    assert result["results"]
