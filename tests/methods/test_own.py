"""Methods of the user's own, from a file or another package."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import yaml

from tal_fast.config.parse import parse_training
from tal_fast.config.schema import Config, MethodConfig
from tal_fast.methods import method_class, method_names
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer
from tal_fast.utils import own_code
from tests.helpers.own_package import installed_package
from tests.helpers.training import config, method

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from tal_fast.methods.ce import CrossEntropy
from tal_fast.methods import Step

class Scaled(CrossEntropy):
    name = "scaled"

    @dataclass
    class Options:
        factor: float = 1.0

    def forward(self, logits, features, labels, indices):
        return Step(self.options.factor * super().forward(logits, features, labels, indices).loss, {})
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a method in a file of the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return "own.py:Scaled"


def test_a_method_of_a_file_is_typed_and_computes(own: str, tmp_path: Path) -> None:
    words = ["--data.dataset", "synthetic", "--data.crop_area", "null", "--method.name", own]
    made = parse_training([*words, "--method.options.factor", "3"])[0].method
    assert made.name == f"{tmp_path / 'own.py'}:Scaled"
    logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
    step = method(made)(logits, torch.rand(6, 2), labels, torch.arange(6))
    torch.testing.assert_close(step.loss, 3 * torch.nn.functional.cross_entropy(logits, labels))
    with pytest.raises(ValueError, match="method.options.factor is 'much' but must be a finite number"):
        method(MethodConfig(own, options={"factor": "much"}))
    with pytest.raises(ValueError, match="method.options.facto is not an option; there are method.options.factor"):
        method(MethodConfig(own, options={"facto": 1}))


@pytest.mark.parametrize(
    ("text", "name", "sentence"),
    [
        (None, "none.py:Scaled", "there is no file .*/none.py, which defines Scaled; put it there, or name another"),
        ("x = 1 / 0", "bad.py:Scaled", r"bad.py:Scaled cannot be imported \(ZeroDivisionError: division by zero\)"),
        (OWN, "bad.py:Scale", "bad.py defines no Scale"),
        (OWN, "bad.py:dataclass", "bad.py:dataclass is no method; it must be a subclass of tal_fast.methods.Method"),
        (OWN + '    score = "mine"', "bad.py:Scaled", r"is no method; .* a score \(cosine, msp"),
    ],
)
def test_what_is_no_method_is_refused(
    text: str | None, name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        method_class(MethodConfig(name).name)


def test_a_run_finds_its_method_again(
    own: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = config(tmp_path / "run", own, epochs=1)
    Trainer(made).fit()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = load_run(tmp_path / "run")
    assert (run.method, run.score) == ("scaled", "msp")
    saved = Config.from_dict(yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()))
    saved.epochs, saved.resume, saved.extend = 2, "auto", True
    (tmp_path / "own.py").write_text(OWN + "# changed")
    with caplog.at_level(logging.WARNING):
        Trainer(saved).fit()
    assert "the method's file" in caplog.text
    assert "not bit for bit" in caplog.text
    (tmp_path / "own.py").unlink()
    own_code._load.cache_clear()
    with pytest.raises(ValueError, match=r"^there is no file .*own\.py, which defines Scaled; put it there"):
        load_run(tmp_path / "run")


def test_a_method_of_an_installed_package_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "[tal_fast.methods]\nscaled = another_package:Scaled\nce = another_package:Scaled\n"
    with installed_package(tmp_path, monkeypatch, "another_package", OWN, entries):
        assert "scaled" in method_names()
        assert method_class("scaled").name == "scaled"
        assert method_class("ce").name == "ce"  # this package's own name stays its own
        MethodConfig("scaled").check()
