"""Properties of every method: found by name, options read, trained and resumed bit for bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast.config.methods import OPTIONS
from tal_fast.config.schema import Config, MethodConfig
from tal_fast.methods import Task, build_method, method_class, method_names
from tal_fast.methods.ce import CrossEntropy
from tal_fast.runs.resume import differences
from tal_fast.scores.logits import SCORES
from tal_fast.training.trainer import Trainer
from tests.helpers.training import assert_same_end, config, one_thread  # noqa: F401
from tests.helpers.training import method as make_method

ROOT = Path(__file__).parents[2]
TRAINING_OPTIONS: dict[str, dict[str, Any]] = {"openmix": {"outliers": "uniform:70"}, "fmfp": {"rho": 0.1}}
"""Options that a method requires, or without which a short run hardly differs from one of another method."""


def test_methods_are_found_by_the_names_of_their_modules() -> None:
    assert set(method_names()) >= set(OPTIONS)
    for name in method_names():
        assert method_class(name).name == name
        assert name not in OPTIONS or method_class(name).Options is OPTIONS[name]
        assert method_class(name).score in SCORES
    with pytest.raises(ValueError, match="no method 'cee'; there are ce, "):
        method_class("cee")


def test_a_method_of_another_package_has_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class FocalOptions:
        gamma: float = 2.0
        backend: str = "fast"  # a name that TAL has too

        def check(self) -> None:
            if self.gamma < 0:
                raise ValueError("gamma is below 0")

    focal = types.ModuleType("tal_fast.methods.focal")
    focal.Focal = type("Focal", (CrossEntropy,), {"name": "focal", "Options": FocalOptions})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, focal.__name__, focal)
    for module in ("methods", "config.methods"):
        monkeypatch.setattr(f"tal_fast.{module}.method_names", lambda: [*OPTIONS, "focal"])
    # Options of TAL in a file of version 0.1.0, or in a preset for TAL, are not the method's.
    values = {"name": "focal", "queue_size": 5, "options": {"gamma": "3e0", "backend": "slow"}}
    options = make_method(Config.from_dict({"method": values}).method).options
    assert options == FocalOptions(3.0, "slow")
    with pytest.raises(ValueError, match="gamma is below 0"):
        make_method(MethodConfig("focal", options={"gamma": -1.0}))
    saved = {"method": {"name": "focal", "queue_size": 5, "options": {"backend": "slow"}}}
    now = Config(method=MethodConfig("focal", options={"gamma": 2.0, "backend": "slow"}))
    assert differences(saved, now) == []
    now.method.options["gamma"] = 3.0
    assert differences(saved, now) == ["method.options.gamma was 2.0 and is 3.0"]
    with pytest.raises(ValueError, match="method.options.gama is not an option; there are method.options.gamma"):
        make_method(MethodConfig("focal", options={"gama": 1.0}))


def test_a_method_with_a_parameter_that_no_optimizer_updates_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = build_method(MethodConfig("ce"), Task(3, 10, 40, 0.1))
    method.scale = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setattr("tal_fast.training.state.build_method", lambda *_: method)
    with pytest.raises(ValueError, match="the method ce has the parameter scale, which no optimizer updates"):
        Trainer(config(tmp_path, "ce"))


@pytest.mark.parametrize("name", method_names())
def test_each_method_trains_and_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    def small_run(folder: str, **options: Any) -> Config:
        method_options = TRAINING_OPTIONS.get(name, {})
        return config(tmp_path / folder, name, epochs=2, method_options=method_options, **options)

    straight = Trainer(small_run("straight"))
    straight.fit()
    assert np.isfinite([row["train_loss"] for row in straight.history]).all()
    parts = Trainer(small_run("parts", checkpoint_every_steps=2))
    steps, train_step = 0, parts.train_step

    def interrupted_step(batch: Any, rate: float) -> None:
        nonlocal steps
        if steps == 9:  # in the second epoch, between its second and its fourth step, after which it saves
            raise KeyboardInterrupt
        steps += 1
        train_step(batch, rate)

    parts.train_step = interrupted_step  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        parts.fit()
    resumed = Trainer(small_run("parts", resume="auto", checkpoint_every_steps=2))
    assert (resumed.state.epoch, resumed.state.step) == (1, 2)
    resumed.fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from tal_fast.utils.distributed import Ranks
from tal_fast.training.trainer import Trainer
sys.path.insert(0, sys.argv[1])
from tests.helpers import training
torch.set_num_threads(1)
ranks = Ranks.start("cpu")
trainer = Trainer(training.config(sys.argv[2], sys.argv[3], epochs=4, method_options=eval(sys.argv[4])), ranks)
trainer.fit()
state = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
if trainer.state.average is not None:
    state = torch.cat([state, *[t.flatten().float() for t in trainer.state.average.network.state_dict().values()]])
extra = trainer.method.state_dict().get("_extra_state")
if extra is not None:
    state = torch.cat([state, extra["times_right"]])
    assert 0 < extra["times_right"].max() <= 4, "an image that two ranks count would have more"
states = [torch.empty_like(state) for _ in range(2)]
dist.all_gather(states, state)
assert torch.equal(*states)
ranks.stop()
print("same", flush=True)
os._exit(0)  # as tal_fast.utils.process does
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crl", "fmfp", "openmix"])
def test_two_ranks_keep_the_same_model(tmp_path: Path, name: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    words = [str(ROOT), str(tmp_path / "run"), name, repr(TRAINING_OPTIONS.get(name, {}))]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2


@pytest.mark.slow
def test_the_documented_method_takes_one_file_and_one_test(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "adding-a-method.md").read_text()
    method, test = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^```sh\npython (.*?)\n```", text, re.DOTALL | re.MULTILINE)
    (tmp_path / "focal.py").write_text(method)
    (tmp_path / "test_focal.py").write_text(test)
    small = "--epochs 1 --data.train-limit 128 --data.loader torch --data.workers 0 --logger none --device cpu"
    for words in (f"-m pytest -q -p no:cacheprovider {tmp_path / 'test_focal.py'}", f"{command} {small}"):
        done = subprocess.run(
            [sys.executable, *words.split()],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "focal" / "checkpoints" / "last.pt").exists()
