"""``python -m tal_fast.experiment``: from a file to jobs, over kills and failures, to tables, a choice and a sweep."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tal_fast.config.parse import load_config, parse_command_line
from tal_fast.config.schema import MethodConfig
from tal_fast.evaluation import compare, report
from tal_fast.evaluation.differences import add_differences
from tal_fast.evaluation.evaluation import evaluate_samples, write_evaluation
from tal_fast.evaluation.sample_scores import Samples, read_samples
from tal_fast.experiments import results, scheduler, select, sweep
from tal_fast.experiments.command import main
from tal_fast.experiments.folder import Folder
from tal_fast.experiments.plan import Experiment, SelectOptions, nest, read_experiment
from tal_fast.metrics.failure import METRICS
from tal_fast.metrics.settings import Mix
from tal_fast.runs import checkpoint
from tal_fast.training.trainer import Trainer
from tests.helpers.training import assert_same_end

ROOT = Path(__file__).parents[2]
SMALL = {
    "data": {"loader": "torch", "workers": 0, "train_limit": 200, "image_size": 8},
    "epochs": 2,
    "device": "cpu",
    "logger": "none",
}


@pytest.fixture(autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write(path: Path, **changes: Any) -> Path:
    """An experiment's file; None leaves a key out."""
    content = {
        "base": "digits-ce",
        "overrides": SMALL,
        "seeds": [0, 1],
        "methods": {"ce": {"method.name": "ce"}, "tal": {"method": {"name": "tal", "queue_size": 150}}},
        **changes,
    }
    path.write_text(yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False))
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


# ---- Files and jobs ---------------------------------------------------------------------------------------------


def test_a_file_stands_for_its_jobs(tmp_path: Path) -> None:
    grid = {"optim.lr": [0.1, "1e-2"], "method.t_wrong": {"values": [None, 20], "methods": ["tal"]}}
    experiment = read_experiment(write(tmp_path / "e.yaml", grid=grid, threads=2))
    of_seed = [
        "ce-lr=0.1", "ce-lr=0.01", "tal-t_wrong=null-lr=0.1", "tal-t_wrong=20-lr=0.1", "tal-t_wrong=null-lr=0.01",
        "tal-t_wrong=20-lr=0.01",
    ]  # fmt: skip
    assert [job.name for job in experiment.jobs] == [f"{label}-seed{seed}" for seed in (0, 1) for label in of_seed]
    job = experiment.jobs[-2]
    assert (job.label, job.method, job.seed) == ("tal-t_wrong=null-lr=0.01", "tal", 1)
    want = load_config("digits-ce").to_dict()
    want["data"] |= SMALL["data"]
    want["method"] = MethodConfig("tal", options={"queue_size": 150, "t_wrong": None}).__dict__
    want["optim"]["lr"] = 0.01
    want |= {"epochs": 2, "device": "cpu", "logger": "none", "seed": 1, "threads": 2, "resume": "auto"}
    assert job.config.to_dict() == want
    # Names depend on the job alone, not on what else is in the file.
    other = read_experiment(write(tmp_path / "f.yaml", grid={"optim.lr": [0.02, 0.01]}, seeds=[1, 7]))
    assert {job.name for job in other.jobs} >= {"ce-lr=0.01-seed1", "tal-lr=0.01-seed7"}


def test_base_and_methods_may_be_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {dataset: digits, channels: 1}\nepochs: 3\nseed: 9\noutput: x\n")
    (tmp_path / "selected.yaml").write_text("methods: {tal: {method: {name: tal, t_max: 40}}}\n")
    path = write(tmp_path / "e.yaml", base="mine.yaml", methods="selected.yaml", overrides=None)
    job = read_experiment(path).jobs[0]
    assert (job.config.epochs, job.config.method.options["t_max"], job.config.seed, job.name) == (3, 40, 0, "tal-seed0")


def test_the_files_in_docs_and_examples_are_read(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs" / "experiments.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "e.yaml").write_text(block)
    assert len(read_experiment(tmp_path / "e.yaml").jobs) == 5 * (2 + 4)
    for path in (ROOT / "examples" / "experiments").glob("*.yaml"):
        assert len(read_experiment(path).jobs) > 1


def test_nested_and_dotted_keys_meet() -> None:
    assert nest({"optim.lr": 1, "optim": {"momentum": 0}, "data": {"ood": {"a.b": "x"}}}) == {
        "optim": {"lr": 1, "momentum": 0}, "data": {"ood": {"a.b": "x"}},
    }  # fmt: skip
    with pytest.raises(ValueError, match="optim is given twice"):
        nest({"optim.lr": 1, "optim": {"lr": 0}})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"overides": {}}, "'overides' is not a key of an experiment; there are base, overrides, seeds"),
        ({"methods": None}, "has no 'methods'; an experiment needs base, methods and seeds"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"a b": {}}}, "the method 'a b' must have a name of letters"),
        ({"methods": {"tal": {"method": {"t_mx": 3}}}}, "method tal: method.t_mx is not an option; there are"),
        ({"methods": {"ce": {"seed": 1}}}, "methods.ce.seed is the runner's own; list seeds under 'seeds'"),
        ({"methods": "gone.yaml"}, "there is no file"),
        ({"overrides": {"epochs": 0}}, "epochs is 0 but must be at least 1"),
        ({"overrides": {"threads": 2}}, "overrides.threads is the runner's own; give 'threads' at the top"),
        ({"overrides": [1]}, "overrides is [1] but must be a mapping"),
        ({"base": "digits"}, "base 'digits' is neither a preset (cifar100-resnet110-ce"),
        ({"seeds": 3}, "seeds is 3 but must be a list such as [0, 1, 2]"),
        ({"seeds": [1, 1]}, "must have each seed once"),
        ({"seeds": [True]}, "a seed is True but must be a whole number of at least 0"),
        ({"threads": 0}, "threads is 0 but must be a whole number of at least 1"),
        ({"grid": {"optim.lr": 0.1}}, "grid.optim.lr is 0.1 but must be a list of values"),
        ({"grid": {"optim.lr": {"values": [1], "only": 2}}}, "grid.optim.lr has 'only'; give a list of values, or"),
        ({"grid": {"optim.lr": {"values": [1], "methods": ["fmfp"]}}}, "there is no method 'fmfp'; there are ce, tal"),
        ({"grid": {"optim.lr": [0.1, "1e-1"]}}, "would share the folder ce-lr=0.1-seed0"),
        ({"grid": {"seed": [1, 2]}}, "grid.seed is the runner's own"),
        ({"grid": {"data.ood.x": ["a", "b"]}}, "OOD sets do not make other runs; name them all under 'evaluate'"),
        ({"evaluate": {"odd": {}}}, "evaluate.odd is not an option of tal_fast.evaluate --run; there are checkpoint"),
        ({"evaluate": {"npz": "x"}}, "evaluate.npz is not an option"),
        ({"evaluate": {"checkpoint": "newest"}}, "evaluate: argument --checkpoint: invalid choice: 'newest'"),
        ({"evaluate": {"mix": "half"}}, "evaluate: argument --mix"),
        ({"evaluate": {"scores": ["cosin"]}}, "evaluate: unknown score cosin"),
        ({"evaluate": {"fast": 1}}, "evaluate.fast is 1 but must be true or false"),
        ({"compare": {"baselin": "ce"}}, "compare.baselin is not an option; there are compare.baseline"),
        ({"compare": {"baseline": "fmfp"}}, "compare.baseline is 'fmfp' but must be one of ce, tal"),
        ({"compare": {"metrics": ["auc"]}}, "compare.metrics: 'auc' is not a metric; there are aurc"),
        ({"compare": {"over": "folds"}}, "compare.over is 'folds'; use 'images' or 'seeds' or 'both'"),
        ({"select": {"metrics": ["aurc"]}}, "'aurc' must be SETTING.METRIC, such as old_fd.aurc"),
        ({"select": {"metrics": ["old_fd.eaurc"]}}, "old_fd.eaurc may be below 0"),
        ({"select": {"accuracy_loss": 2}}, "select.accuracy_loss is 2.0 but must be a fraction in [0, 1]"),
        ({"select": {"metrics": ["new_fd/x.aurc"]}}, "select.metrics: no run is evaluated on 'x'; on "),
        ({"compare": {"score": "cosin"}}, "compare.score: unknown score cosin"),
        ({"methods": {"l": {"method": {"name": "logitnorm", "options": {"tua": 1}}}}}, "l: method.options.tua is"),
        ({"methods": {"t": {"method": {"name": "tal", "t_min": 9, "t_max": 5}}}}, "t: temperatures are t_min=9.0"),
        ({"grid": {"method.t_wrong": [5, 10]}}, "grid.method.t_wrong changes nothing in ce, which is"),
        ({"grid": {"method.options.t_wrong": [5]}}, "grid.method.options.t_wrong changes nothing in ce, which is"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_in_a_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "e.yaml", **changes)
    assert sentence in refusal([str(path), "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "e.yaml"))
    assert "--jobs must be at least 1, not 0" in refusal([path, "--jobs", "0"], capsys)
    assert "--nproc goes with --export-sweep" in refusal([path, "--nproc", "2"], capsys)
    assert "must be SETTING.METRIC" in refusal([path, "--select", "aurc"], capsys)
    assert "there is no file gone.yaml" in refusal(["gone.yaml"], capsys)
    gone = [path, "--output", str(tmp_path / "gone"), "--table-only"]
    assert "results.json, and no runs to make it from; leave --table-only out" in refusal(gone, capsys)


# ---- Folders ----------------------------------------------------------------------------------------------------


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    command = [str(tmp_path / "e.yaml"), "--output", str(output), "--dry-run"]
    for folder in scheduler.folders(read_experiment(write(tmp_path / "e.yaml")), output):
        folder.prepare()
    assert main(command) == 0
    assert capsys.readouterr().out.count(": to train") == 4
    for changed, sentence in (
        ({"epochs": 3}, "ce-seed0 was made by another configuration (epochs was 2 and is 3); set it back, give the"),
        ({"data.ood": {"x": "y"}}, "data.ood was {} and is {'x': 'y'}: add sets under 'evaluate' instead"),
    ):
        write(tmp_path / "e.yaml", overrides={**SMALL, **changed})
        assert sentence in refusal(command, capsys)
    # An option that is left out is its default, be it then or now.
    for then, now, words in (({"tau": 0.3}, {}, "tau was 0.3 and is 0.04"), ({}, {"tau": 0.04}, None)):
        job = [tmp_path / "l.yaml", "--output", tmp_path / f"l{len(then)}", "--dry-run"]
        methods = [{"l": {"method": {"name": "logitnorm", "options": options}}} for options in (then, now)]
        for folder in scheduler.folders(read_experiment(write(job[0], methods=methods[0])), job[2]):
            folder.prepare()
        write(job[0], methods=methods[1])
        if words:
            assert words in refusal(list(map(str, job)), capsys)
        else:
            assert main(list(map(str, job))) == 0
    # Where and how fast it runs may differ; other seeds and methods are other folders.
    more = {"ce": {"method.name": "ce"}, "smooth": {"method": {"name": "ce", "label_smoothing": 0.1}}}
    write(tmp_path / "e.yaml", threads=2, overrides={**SMALL, "logger": "all"}, seeds=[1, 2], methods=more)
    assert main(command) == 0
    (output / "runs" / "ce-seed2").mkdir()
    (output / "runs" / "ce-seed2" / "config.yaml").write_text("epochs: 2\n")
    assert "ce-seed2 holds a run that is not of an experiment" in refusal(command, capsys)


def test_a_process_that_outlives_its_runner_keeps_the_job(tmp_path: Path) -> None:
    folder = scheduler.folders(read_experiment(write(tmp_path / "e.yaml")), tmp_path)[0]
    folder.prepare()
    lock = folder.lock()
    assert lock is not None
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock,)) as process:
        os.close(lock)  # as the runner's death does
        assert folder.lock() is None
        assert f"process {os.getpid()}" in folder.holder()
        process.communicate(b"\n")
    again = folder.lock()
    assert again is not None
    os.close(again)


# ---- Running ----------------------------------------------------------------------------------------------------


def judge(
    path: Path, quality: float, seed: int, accuracy: float = 0.8, sets: tuple[str, ...] = ("far", "near")
) -> None:
    """Report and samples in a run's folder, as an evaluation would leave them."""
    rng = np.random.default_rng(seed + 1)
    correct = np.random.default_rng(0).random(300) < accuracy
    scores = {"msp": quality * correct + rng.normal(size=300)}
    ood = {name: {"msp": rng.normal(size=90) - i} for i, name in enumerate(sets)}
    samples = Samples(correct, scores, ood, dict.fromkeys(("val", *sets), "same"))
    evaluation = evaluate_samples(samples, report.EvaluationOptions(mix=Mix("all")))
    evaluation.report.update({"score": "msp", "run": str(path)})
    write_evaluation(evaluation, path)


# Stand-ins for training and evaluation, which take seconds to start: what they print and how they end is in a file.
TRAIN = "import sys, os, signal, pathlib; run = pathlib.Path(sys.argv[1]); exec(pathlib.Path(sys.argv[2]).read_text())"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Let jobs run this code, with ``run`` the folder; the evaluation copies a report. What was run comes back."""
    ran: list[str] = []
    script = tmp_path / "train.py"
    judge(tmp_path / "report", 1.0, 0)

    def command(stage: str, run: Path, words: Any, device: str) -> list[str]:
        ran.append(f"{stage} {run.name}")
        if stage == "train":
            return [sys.executable, "-c", TRAIN, str(run), str(script)]
        return ["cp", *(str(tmp_path / "report" / name) for name in ("report.json", "samples.npz")), str(run)]

    def use(code: str) -> list[str]:
        script.write_text(code)
        ran.clear()
        return ran

    monkeypatch.setattr(scheduler, "command", command)
    monkeypatch.setattr(scheduler, "_describe_machine", lambda environment: None)
    return use


def test_what_is_done_is_skipped_and_failures_are_named(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    no_bootstrap = {"bootstrap": 0}
    path = write(tmp_path / "e.yaml", compare=no_bootstrap)
    command = [str(path), "--output", str(tmp_path / "out"), "--jobs", "2"]
    ran = stand_in(
        "if run.name == 'tal-seed0': print('hello'); print('error: no such thing'); sys.exit(2)\n"
        "if run.name == 'ce-seed1': os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert main(command) == 1
    said = capsys.readouterr().out
    log = tmp_path / "out" / "runs" / "tal-seed0" / "log.txt"
    assert f"tal-seed0: train failed, exit code 2: error: no such thing; see {log}" in said
    assert "ce-seed1: train failed, killed by SIGKILL" in said
    assert "hello" in log.read_text()
    assert "2 of 4 runs" in said
    assert "missing: tal-seed0 (exit code 2: error: no such thing)" in said
    assert sorted(ran) == sorted(
        [*(f"train {m}-seed{s}" for m in ("ce", "tal") for s in (0, 1)), "evaluate ce-seed0", "evaluate tal-seed1"]
    )
    ran = stand_in("")
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "2 of 4 jobs are done already" in said
    assert "4 of 4 done" in said
    assert "left" not in said.splitlines()[2]  # nothing is
    assert sorted(ran) == sorted(
        f"{stage} {name}" for stage in ("train", "evaluate") for name in ("tal-seed0", "ce-seed1")
    )
    ran = stand_in("sys.exit(1)")
    assert main(command) == 0
    assert ran == []
    record = json.loads((tmp_path / "out" / "runs" / "tal-seed0" / "job.json").read_text())
    assert [(a["stage"], a["exit_code"]) for a in record["attempts"]] == [("train", 2), ("train", 0), ("evaluate", 0)]
    # Other options of the evaluation, or a report that somebody has written anew: evaluated again, not trained.
    write(tmp_path / "e.yaml", evaluate={"checkpoint": "last"}, compare=no_bootstrap)
    assert main(command) == 0
    assert sorted(ran) == sorted(f"evaluate {m}-seed{s}" for m in ("ce", "tal") for s in (0, 1))
    ran.clear()
    judge(tmp_path / "out" / "runs" / "ce-seed0", 2.0, 5)
    assert main(command) == 0
    assert ran == ["evaluate ce-seed0"]


def test_a_runner_that_is_told_to_stop_tells_its_jobs(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(write(tmp_path / "e.yaml")), "--output", str(tmp_path / "out"), "--jobs", "1"]
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        ran = stand_in(
            "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
            f"os.kill(os.getppid(), {int(number)})\n"
            "signal.pause()"
        )
        assert main(command) == code
        assert ran == ["train ce-seed0"]
        said = capsys.readouterr().out
        assert "stopping: the jobs save and end; the same command goes on with them" in said
        assert "failed" not in said
        assert "saved" in (tmp_path / "out" / "runs" / "ce-seed0" / "log.txt").read_text()
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_damaged_folder_fails_alone(
    tmp_path: Path, stand_in: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "e.yaml", seeds=[0], compare={"bootstrap": 0})
    output = tmp_path / "out"
    # The first damages the folder of the second, and is told to stop by nobody.
    ran = stand_in(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "(run.parent / 'tal-seed0').mkdir(exist_ok=True)\n"
        "(run.parent / 'tal-seed0' / 'asked.yaml').write_text('epochs: 77')"
    )
    assert main([str(path), "--output", str(output), "--jobs", "1"]) == 1
    said = capsys.readouterr()
    assert "tal-seed0: failed, " in said.out
    assert "epochs was 77 and is 2" in said.out
    assert ran == ["train ce-seed0", "evaluate ce-seed0"]
    assert "1 of 2 runs" in said.out


def test_two_runners_share_the_jobs(tmp_path: Path, stand_in: Callable[[str], list[str]]) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml"))
    ran = stand_in("")
    taken = scheduler.folders(experiment, tmp_path)[0]
    taken.prepare()
    lock = taken.lock()
    assert lock is not None
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if sum("done in" in line for line in said) == 3 and "done in" in line:  # the other runner comes to its end
            judge(taken.path, 1.0, 0)
            taken.set_evaluated(experiment.evaluate)
            os.close(lock)

    runner = scheduler.Scheduler(experiment, tmp_path, [{}, {}], say)
    runner.run(scheduler.StopRequest())
    assert not any("ce-seed0" in line for line in ran)
    assert any(line.startswith("ce-seed0 is being run by") for line in said)
    assert said[-1] == "ce-seed0 was done by another runner"


def test_jobs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml", threads=2))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(scheduler, "_gpus", lambda: ["2", "GPU-x"])
    assert scheduler.slots(experiment) == [{}] * 3  # device: cpu
    assert scheduler.slots(experiment, 5) == [{}] * 5
    experiment = read_experiment(write(tmp_path / "e.yaml", overrides={"device": "auto"}))
    on = [{"CUDA_VISIBLE_DEVICES": "2"}, {"CUDA_VISIBLE_DEVICES": "GPU-x"}]
    assert scheduler.slots(experiment) == on
    assert scheduler.slots(experiment, 3) == [*on, on[0]]
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 3")
    assert scheduler._gpus() == ["5", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert scheduler._gpus() == ["0", "1"]


def test_durations() -> None:
    assert [scheduler.duration(s) for s in (0.4, 89, 91, 3600, 11_100)] == [
        "0 s",
        "89 s",
        "2 min",
        "60 min",
        "3 h 05 min",
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the job trains on when its runner is killed")
def test_a_killed_runner_goes_on_where_its_job_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(
        tmp_path / "e.yaml",
        methods={"tal": {"method": {"name": "tal", "queue_size": 150}}},
        seeds=[3],
        overrides={**SMALL, "epochs": 12},
        evaluate={"checkpoint": "last", "fast": True, "no_typicalness": True},
    )
    output = tmp_path / "out"
    arguments = [str(path), "--output", str(output), "--jobs", "1"]
    runner = subprocess.Popen([sys.executable, "-m", "tal_fast.experiment", *arguments])
    folder = scheduler.folders(read_experiment(path), output)[0]
    deadline = time.monotonic() + 200
    while not checkpoint.exists(folder.path / "checkpoints"):
        assert time.monotonic() < deadline
        assert runner.poll() is None
        time.sleep(0.02)
    runner.kill()
    runner.wait()
    # Its process ends by itself, saved, and only then is the job free.
    while (lock := folder.lock()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.close(lock)
    assert "stopped by SIGTERM and saved" in (folder.path / "log.txt").read_text()
    assert checkpoint.load(folder.path / "checkpoints" / "last.pt")["epoch"] < 12

    assert main(arguments) == 0
    assert "tal-seed3: done in" in capsys.readouterr().out
    straight = replace(folder.job.config, output=str(tmp_path / "straight"))
    Trainer(straight).fit()
    assert_same_end(folder.path, tmp_path / "straight")
    found = results.read_results(output)
    (run,) = found["runs"]
    assert (run["method"], run["seed"], run["report"]["checkpoint"]) == ("tal", 3, "last")
    assert run["attempts"] == 3
    assert run["seconds"]["train"] > 0
    assert run["seconds"]["evaluate"] > 0
    assert found["environments"][0]["torch"] == torch.__version__
    assert str(tmp_path) not in (output / "results.json").read_text()  # nothing of where it lay
    assert main(arguments) == 0
    assert "1 of 1 jobs are done already" in capsys.readouterr().out


# ---- Tables -----------------------------------------------------------------------------------------------------

GRID: dict[str, Any] = {"optim.lr": [0.1, 0.2]}


def finished(output: Path, experiment: Experiment, quality: Callable[[Any], tuple[float, float]]) -> None:
    """All jobs done, with reports of a quality and accuracy; an accuracy of NaN leaves a job out."""
    for folder in scheduler.folders(experiment, output):
        good, accuracy = quality(folder.job)
        if np.isnan(accuracy):
            continue
        folder.prepare()
        judge(folder.path, good, folder.job.seed, accuracy)
        folder.update(trained=True)
        folder.set_evaluated(experiment.evaluate)


def test_tables_from_runs_and_from_committed_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", seeds=[0, 1, 2], compare={"baseline": "ce", "bootstrap": 200})
    experiment = read_experiment(path)
    output = tmp_path / "out"
    command = [str(path), "--output", str(output), "--table-only"]
    finished(output, experiment, lambda job: (2.0 if job.method == "tal" else 1.0, 0.8))
    assert main(command) == 0
    said = capsys.readouterr().out
    for title in ("Old FD\n", "OOD against far\n", "New FD against near\n", "OOD: mean over 2 OOD sets\n"):
        assert title in said
    found = results.read_results(output)
    assert len(found["runs"]) == 6
    # The numbers are those of tal_fast.compare on the same folders.
    names = [f"{method}-seed{seed}" for method in ("ce", "tal") for seed in (0, 1, 2)]
    folders = [output / "runs" / name for name in names]
    groups = compare.group_runs(
        [report.read_report(f) for f in folders], names, [name[:3] for name in names],
        [read_samples(f) for f in folders], seeds=[0, 1, 2] * 2,
    )  # fmt: skip
    columns = [("old_fd", "aurc"), ("ood/far", "fpr95"), ("new_fd", "auroc")]
    add_differences(groups, groups[0], columns, 200, "both")
    by_column = {(d["label"], d["setting"], d["metric"]): d for d in found["differences"]}
    assert {key[0] for key in by_column} == {"tal"}
    for setting, metric in columns:
        want, got = groups[1].differences[setting, metric], by_column["tal", setting, metric]
        assert [got[key] for key in ("value", "low", "high")] == pytest.approx(list(want[:3]))
        assert (got["over"], got["baseline"]) == ("both", "ce")
    assert len((output / "table.csv").read_text().splitlines()) == 1 + 2 * 3 * 7
    # From the file alone.
    committed = tmp_path / "committed"
    committed.mkdir()
    shutil.copy(output / "results.json", committed)
    assert main([str(path), "--output", str(committed), "--table-only"]) == 0
    for name in ("table.txt", "table.md", "table.csv"):
        assert (committed / name).read_bytes() == (output / name).read_bytes()
    write(path, seeds=[0, 1, 2], compare={"baseline": "tal", "bootstrap": 200})
    assert "results.json was made with other 'compare' options" in refusal(
        [*command[:2], str(committed), command[3]], capsys
    )


def test_what_is_missing_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", compare={"bootstrap": 0})
    output = tmp_path / "out"
    finished(output, read_experiment(path), lambda job: (1.0, np.nan if job.name == "tal-seed1" else 0.8))
    assert main([str(path), "--output", str(output), "--table-only"]) == 1
    said = capsys.readouterr().out
    assert "3 of 4 runs" in said
    assert "missing: tal-seed1 (not done)" in said
    assert all(d["over"] == "" for d in results.read_results(output)["differences"])  # one run, no interval


def test_results_are_not_replaced_by_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "e.yaml", compare={"bootstrap": 0})
    output = tmp_path / "out"
    finished(output, read_experiment(path), lambda job: (1.0, 0.8))
    command = [str(path), "--output", str(output), "--table-only"]
    assert main(command) == 0
    before = (output / "results.json").read_bytes()
    shutil.rmtree(output / "runs" / "tal-seed1")
    assert "results.json has 1 runs that are not done here, such as tal-seed1, and is kept" in refusal(command, capsys)
    assert (output / "results.json").read_bytes() == before


def test_without_a_baseline_the_first_method_of_the_file_is_it(tmp_path: Path) -> None:
    experiment = read_experiment(write(tmp_path / "e.yaml", seeds=[0], compare={"bootstrap": 0}))
    finished(tmp_path / "out", experiment, lambda job: (1.0, np.nan if job.method == "ce" else 0.8))
    assert results.collect(experiment, scheduler.folders(experiment, tmp_path / "out"), "e")["differences"] == []


def test_the_evaluation_is_on_the_device_of_the_training(tmp_path: Path) -> None:
    words = scheduler.command("evaluate", tmp_path, ("--fast",), "cpu")
    assert words[-2:] == ["--device", "cpu"]
    assert scheduler.command("evaluate", tmp_path, ("--device", "cuda"), "cpu")[-2:] == ["--device", "cuda"]


def test_the_baseline_is_taken_at_the_same_grid_point(tmp_path: Path) -> None:
    def baselines(**changes: Any) -> dict[str, str]:
        experiment = read_experiment(write(tmp_path / "e.yaml", seeds=[0], **changes))
        output = tmp_path / str(len(list(tmp_path.iterdir())))
        finished(output, experiment, lambda job: (1.0, 0.8))
        found = results.collect(experiment, scheduler.folders(experiment, output), "e")
        return {d["label"]: d["baseline"] for d in found["differences"]}

    options = {"bootstrap": 20, "baseline": "ce"}
    assert baselines(grid=GRID, compare=options) == {"tal-lr=0.1": "ce-lr=0.1", "tal-lr=0.2": "ce-lr=0.2"}
    only = {"optim.lr": {"values": [0.1, 0.2], "methods": ["tal"]}}
    assert baselines(grid=only, compare=options) == {"tal-lr=0.1": "ce", "tal-lr=0.2": "ce"}
    of_one = {**options, "baseline": "ce-lr=0.2"}
    assert baselines(grid=GRID, compare=of_one) == dict.fromkeys(["ce-lr=0.1", "tal-lr=0.1", "tal-lr=0.2"], "ce-lr=0.2")


# ---- Selection --------------------------------------------------------------------------------------------------


def test_selection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = {"optim.lr": [0.1, 0.2, 0.3, 0.4]}
    options = {"compare": {"baseline": "ce", "bootstrap": 0}, "evaluate": {"ood": {"far": "patches"}}}
    path = write(tmp_path / "e.yaml", grid=grid, **options)
    experiment = read_experiment(path)
    output = tmp_path / "out"
    # The surest is too often wrong, the next has a seed too few.
    quality = {0.1: (1.0, 0.8), 0.2: (3.2, 0.79), 0.3: (3.0, 0.8), 0.4: (2.0, 0.8)}

    def made(job: Any) -> tuple[float, float]:
        good, accuracy = quality[job.grid["optim.lr"]] if job.method == "tal" else (1.0, 0.8)
        return good, np.nan if job.name == "tal-lr=0.3-seed1" else accuracy

    finished(output, experiment, made)
    command = [str(path), "--output", str(output), "--table-only", "--select", "old_fd.aurc", "new_fd/far.auroc"]
    assert main(command) == 1
    said = capsys.readouterr().out
    rows = {line.split()[0]: line for line in said[said.index("chosen (*)") :].splitlines() if "lr=" in line}
    assert "tal-lr=0.2" in rows
    assert "accuracy more than 0.50% below" in rows["tal-lr=0.2"]
    assert "1 of 2 seeds" in rows["tal-lr=0.3"]
    found = select.candidates(
        experiment, results.read_results(output), SelectOptions(["old_fd.aurc", "new_fd/far.auroc"])
    )
    for candidate in found:
        runs = [r["report"] for r in results.read_results(output)["runs"] if r["label"] == candidate.label]
        losses = (
            np.mean([r["settings"]["old_fd"]["msp"]["aurc"] for r in runs]),
            1 - np.mean([r["settings"]["new_fd/far"]["msp"]["auroc"] for r in runs]),
        )
        assert candidate.value == pytest.approx(np.sqrt(losses[0] * losses[1]))
    assert "tal-lr=0.4*" in rows
    assert "ce-lr=0.1*" in rows  # all of ce are alike: the first
    chosen = yaml.safe_load((output / "selected.yaml").read_text())["methods"]
    assert chosen["tal"] == {"method": {"name": "tal", "options": {"queue_size": 150}}, "optim": {"lr": 0.4}}
    assert "set data.holdout to choose on held-out training images" in said
    # The fragment is another experiment's methods.
    again = read_experiment(write(tmp_path / "f.yaml", methods="out/selected.yaml", seeds=[0]))
    assert again.jobs[1].config == next(j.config for j in experiment.jobs if j.name == "tal-lr=0.4-seed0")
    # A smaller accuracy is allowed if one says so; a metric of a set that is not there is refused.
    free = select.candidates(experiment, results.read_results(output), SelectOptions(accuracy_loss=0.5))
    assert select.chosen(free)["tal"].label == "tal-lr=0.2"
    assert "no run is evaluated on 'x'" in refusal([*command[:5], "new_fd/x.aurc"], capsys)
    with pytest.raises(ValueError, match="no setting 'new_fd/x'"):
        select.candidates(experiment, results.read_results(output), SelectOptions(["new_fd/x.aurc"]))


# ---- Sweeps -----------------------------------------------------------------------------------------------------


def agent_commands(path: Path) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """What an agent of Weights & Biases runs for the sweep: every combination, ``${...}`` in their places."""
    content = yaml.safe_load(path.read_text())
    parameters = {name: entry["values"] for name, entry in content["parameters"].items()}
    for values in itertools.product(*parameters.values()):
        arguments = dict(zip(parameters, values, strict=True))
        assert None not in values  # of which the agent would make None, or nothing
        macros = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": ["python"],
            "${program}": [content["program"]],
            "${args}": [f"--{name}={value}" for name, value in arguments.items()],
        }
        yield [word for chunk in content["command"] for word in macros.get(chunk, [chunk])], arguments


@pytest.mark.parametrize("nproc", [None, 2])
def test_a_sweep_has_the_same_jobs(nproc: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = {
        "optim.lr": [1e-5, 0.1],
        "optim.clip_norm": [None, 1],
        "data.flip": [True, False],
        "method.t_wrong": {"values": [None, 20], "methods": ["tal"]},
    }
    experiment = read_experiment(write(tmp_path / "e.yaml", grid=grid, seeds=[0]))
    monkeypatch.chdir(tmp_path)
    options = [] if nproc is None else ["--nproc", str(nproc)]
    assert main(["e.yaml", "--export-sweep", "sweeps/mine.yaml", *options]) == 0
    # In place of Python and torchrun, something that prints its arguments.
    show = tmp_path / "bin"
    show.mkdir()
    for name in ("python", "torchrun"):
        (show / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (show / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{show}:{os.environ['PATH']}", "WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "r 1"}
    found = []
    for words, _ in agent_commands(Path("sweeps/mine.yaml")):
        assert "$" not in "".join(words[:3] + words[4:])  # no macro was left, and the rest is the shell's
        said = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
        assert said[:2] == ["-m", "tal_fast.train"] or said[2:4] == ["-m", "tal_fast.train"]
        if nproc is not None:
            from torch.distributed.run import parse_args

            launch = parse_args(said)
            assert (launch.nproc_per_node, launch.module, launch.training_script) == ("2", True, "tal_fast.train")
            assert launch.training_script_args == said[4:]
        config, _ = parse_command_line(said[said.index("tal_fast.train") + 1 :])
        assert (config.output, config.resume, config.logger) == ("runs/s/r 1", "auto", "wandb")
        found.append(replace(config, output="", logger="none").to_dict())
    want = [replace(job.config, output="").to_dict() for job in experiment.jobs]
    assert len(found) == len(want) == 24
    key = json.dumps
    assert sorted(map(key, found)) == sorted(map(key, want))
    content = yaml.safe_load(Path("sweeps/mine.yaml").read_text())
    assert content["metric"] == {"name": "epoch/aurc", "goal": "minimize"}
    assert "aurc" in METRICS


def test_sweep_words() -> None:
    assert [sweep._word(v) for v in (None, [1, None], {"a": "b"}, True, 1e-5, "x")] == [
        "null", "[1, null]", "{a: b}", True, 1e-5, "x",
    ]  # fmt: skip


def test_folder_names_who_has_it(tmp_path: Path) -> None:
    folder = Folder(read_experiment(write(tmp_path / "e.yaml")).jobs[0], tmp_path / "none")
    assert folder.holder() == "another runner"
    assert folder.last_words() == ""
