"""Jobs of an experiment."""

from __future__ import annotations

from pathlib import Path

import pytest

from tal_fast.config.parse import load_config, nest
from tal_fast.config.schema import MethodConfig
from tal_fast.experiments.parse import read_experiment
from tests.helpers.experiments import SMALL, write


def test_one_job_for_each_seed_method_and_grid_point(tmp_path: Path) -> None:
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
    # Names depend on the job alone, not on the rest of the file.
    other = read_experiment(write(tmp_path / "f.yaml", grid={"optim.lr": [0.02, 0.01]}, seeds=[1, 7]))
    assert {job.name for job in other.jobs} >= {"ce-lr=0.01-seed1", "tal-lr=0.01-seed7"}


def test_nested_and_dotted_keys_are_merged() -> None:
    assert nest({"optim.lr": 1, "optim": {"momentum": 0}, "data": {"ood": {"a.b": "x"}}}) == {
        "optim": {"lr": 1, "momentum": 0}, "data": {"ood": {"a.b": "x"}},
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"^optim\.lr is given twice"):
        nest({"optim.lr": 1, "optim": {"lr": 0}})
    for values in ({"optim": 1, "optim.lr": 2}, {"optim.lr": 2, "optim": 1}, {"optim.lr.x": 2, "optim": {"lr": 1}}):
        with pytest.raises(ValueError, match=r"optim(\.lr)? is given twice"):
            nest(values)
    with pytest.raises(ValueError, match=r"^optim\.lr is given twice"):
        nest({"lr": 1, "lr.x": 2}, "optim")


def test_dotted_keys_of_any_depth_share_their_sections() -> None:
    assert nest({"method.options.t_min": 2, "method.options.t_max": 20, "method.name": "tal"}) == {
        "method": {"options": {"t_min": 2, "t_max": 20}, "name": "tal"},
    }  # fmt: skip
