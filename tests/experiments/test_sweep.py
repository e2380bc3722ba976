"""Weights & Biases sweeps."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tal_fast.config.parse import parse_training
from tal_fast.experiments import sweep
from tal_fast.experiments.command import main
from tal_fast.experiments.parse import read_experiment
from tal_fast.metrics.failure import METRICS
from tests.helpers.experiments import write


def agent_commands(path: Path) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """Command lines that the Weights & Biases agent runs for the sweep, with all macros expanded."""
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
    # Replace Python and torchrun by a script that prints its arguments.
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
        config, *_ = parse_training(said[said.index("tal_fast.train") + 1 :])
        assert (config.output, config.resume, config.logger) == ("runs/s/r 1", "auto", "wandb")
        found.append(replace(config, output="", logger="none").to_dict())
    want = [replace(job.config, output="").to_dict() for job in experiment.jobs]
    assert len(found) == len(want) == 24
    key = json.dumps
    assert sorted(map(key, found)) == sorted(map(key, want))
    content = yaml.safe_load(Path("sweeps/mine.yaml").read_text())
    assert content["metric"] == {"name": "epoch/aurc", "goal": "minimize"}
    assert "aurc" in METRICS


def test_parameters_of_a_sweep() -> None:
    assert [sweep._parameter(v) for v in (None, [1, None], {"a": "b"}, True, 1e-5, "x")] == [
        "null", "[1, null]", "{a: b}", True, 1e-5, "x",
    ]  # fmt: skip
