"""Fault injection of ``bench.faults``, which raises where a run behaves otherwise than documented."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.faults import __main__ as command
from bench.faults import registry, runs
from bench.faults.kills import CONFIGURATIONS, kill_all
from bench.faults.runs import Failed, Impossible
from bench.faults.soak import soak
from tal_fast.runs import checkpoint
from tests.helpers import checkpoints

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which undisturbed runs to compare with are trained once."""
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_killed_runs_resume_to_the_same_bits(work: Path) -> None:
    out = work / "kills.json"
    assert kill_all(work / "kills", count=10, out=out, jobs=2)
    result = json.loads(out.read_text())
    assert result["kills"] + sum("not tried" in entry["result"] for entry in result["results"]) == 10
    assert len(result["results"]) == 10  # one kill of each of the first ten configurations


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_half_a_minute_of_random_faults_ends_as_undisturbed(work: Path) -> None:
    outcome = soak(work / "soak", minutes=0.5, every=8)
    assert sum(outcome["faults"].values()) >= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", sorted(registry.FAULTS.keys() - {"kills"}))
def test_fault_has_its_documented_outcome(work: Path, name: str) -> None:
    if name.endswith("dali") and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("needs DALI")
    try:
        registry.FAULTS[name].inject(work / name)
    except Impossible as reason:
        pytest.skip(str(reason))


def test_the_table_of_the_documentation_is_that_of_the_faults() -> None:
    assert registry.table() in registry.DOCS.read_text()


def test_the_configurations_that_are_killed_cover_methods_loaders_and_processes() -> None:
    words = " ".join(each.words for each in CONFIGURATIONS.values())
    assert len(CONFIGURATIONS) == 13
    assert {each.processes for each in CONFIGURATIONS.values()} == {1, 2, 4}
    for part in (
        "ema-decay",
        "accumulate",
        "bfloat16",
        "name fmfp ",
        "name crl",
        "loader dali",
        "workers 1",
        "cifar10",
        "webdataset",
    ):
        assert part in words, part


def written_run(folder: Path, **changes: object) -> Path:
    """Synthetic output folder of a run."""
    content = {
        **checkpoints.content(),
        "config": {"output": str(folder), "seed": 3},
        "model": {"weight": torch.arange(3.0)},
        "ranks": [{"method": {"queue": torch.ones(2)}}],
        "history": [{"train_loss": 0.5, "seconds": float(len(str(folder)))}],
        **changes,
    }
    for name in (checkpoint.LAST, checkpoint.BEST):
        checkpoint.save(folder / checkpoint.FOLDER / name, content)
    (folder / "metrics.csv").write_text(f"epoch,train_loss,seconds\n1,0.5,{len(str(folder))}\n")
    return folder


def test_comparison_finds_each_difference(tmp_path: Path) -> None:
    one, same = written_run(tmp_path / "one"), written_run(tmp_path / "another")
    assert runs.differences(one, same) == []  # other paths, other timings
    for change, entry in (
        ({"model": {"weight": torch.tensor([0.0, 1.0, 2.0000002])}}, ".model.weight"),
        ({"model": {"weight": torch.arange(3.0), "bias": torch.zeros(1)}}, ".model.bias"),
        ({"ranks": [{"method": {"queue": torch.zeros(2)}}]}, ".ranks.0.method.queue"),
        ({"history": [{"train_loss": 0.25, "seconds": 1.0}]}, ".history.0.train_loss"),
        ({"config": {"output": "x", "seed": 4}}, ".config.seed"),
        ({"step": 1}, ".step"),
    ):
        other = written_run(tmp_path / "other", **change)
        assert runs.differences(one, other) == [name + entry for name in (checkpoint.LAST, checkpoint.BEST)]
    (same / "metrics.csv").write_text("epoch,train_loss,seconds\n1,0.25,1\n")
    assert runs.differences(one, same) == ["metrics.csv"]
    (same / ".metrics.csv.x").write_text("")
    with pytest.raises(Failed, match="did not end as"):
        runs.expect_same_end(one, same)


def test_leftover_files_are_found(tmp_path: Path) -> None:
    one, other = written_run(tmp_path / "one"), written_run(tmp_path / "other")
    (other / ".metrics.csv.x1").write_text("")
    with pytest.raises(Failed, match=r"temporary files were left behind: .*\.metrics\.csv\.x1"):
        runs.expect_same_end(one, other)


WRITER = """
import sys, torch
from bench import fault_points
from tal_fast.runs import checkpoint
from tests.helpers import checkpoints
from pathlib import Path
fault_points.arm(sys.argv[1])
weight = torch.nn.Parameter(torch.zeros(1000))
optimizer = torch.optim.SGD([weight], lr=1.0)
for step in range(1, 6):
    weight.grad = torch.ones(1000)
    optimizer.step()
    checkpoint.save(Path("last.pt"), {"step": step}, previous=Path("previous.pt"))
"""


@pytest.mark.parametrize(
    ("point", "last", "previous", "temporary"),
    [
        ("job:half-written:3:0", 2, 1, True),  # the third save is the first after the third step
        pytest.param("job:written:3:0", 2, 1, True, marks=pytest.mark.slow),
        pytest.param("job:renaming:3:0", 2, 1, True, marks=pytest.mark.slow),
        ("job:renamed:3:0", None, 2, True),  # the first rename is that of the checkpoint before
        pytest.param("job:renamed:3:1", 3, 2, False, marks=pytest.mark.slow),
        pytest.param("job:renamed:3:2", None, 3, True, marks=pytest.mark.slow),
        pytest.param("job:step:5:0.5", 5, 4, False, marks=pytest.mark.slow),
    ],
)
def test_process_dies_at_the_chosen_point(
    tmp_path: Path, point: str, last: int | None, previous: int, temporary: bool
) -> None:
    words = [sys.executable, "-c", WRITER + ("import time; time.sleep(60)" if ":step:" in point else ""), point]
    done = subprocess.run(words, cwd=tmp_path, env=runs.surroundings(tmp_path), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for name, step in (("last.pt", last), ("previous.pt", previous)):
        path = tmp_path / name
        found = torch.load(path, weights_only=True)["step"] if path.exists() else None
        assert found == step, name
    assert bool(list(tmp_path.glob(".last-*.pt"))) == temporary


def test_job_kills_its_children(tmp_path: Path) -> None:
    code = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    with runs.Job(tmp_path, [sys.executable, "-c", code]) as job:
        (child,) = runs.wait_for("its child", job.ranks)
        assert runs.alive(child)
    assert job.process.returncode == -signal.SIGKILL
    runs.wait_for("the end of the child", lambda: not runs.alive(child), timeout=10)
    assert not os.path.exists(f"/proc/{job.process.pid}")


def test_command_writes_outcomes_and_reports_failures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folder: Path) -> dict[str, object]:
        raise Failed("it went wrong")

    def fault(inject: object) -> registry.Fault:
        return registry.Fault("x", "y", "0", inject)  # type: ignore[arg-type]

    faults = {"good": fault(lambda folder: {"s": 1}), "kills": fault(None), "bad": fault(broken)}
    monkeypatch.setattr(command, "FAULTS", faults)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["faults", "good", "bad", "--out", str(out), "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="not as documented: bad; their files are in"):
        command.main()
    printed = capsys.readouterr().out
    assert "good: as documented (s: 1)\n" in printed
    assert "bad: FAILED: it went wrong\n" in printed
    (entry,) = json.loads(out.read_text())["results"]
    assert (entry["fault"], entry["measured"]) == ("good", {"s": 1})
    monkeypatch.setattr(sys, "argv", ["faults", "worse"])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert caught.value.code == 2
