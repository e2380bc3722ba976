"""Metrics on request that need labels: balanced over classes, and of a matrix of costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tal_fast.evaluation import command
from tal_fast.metrics.further import further_metrics


def test_balanced_metrics_and_those_of_costs_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng()
    logits, labels = rng.normal(size=(90, 3)) * 3, rng.integers(0, 3, 90)
    np.savez(tmp_path / "x.npz", logits=logits, labels=labels, ood_far_logits=rng.normal(size=(20, 3)))
    costs = rng.random((3, 3)).round(3)
    np.savetxt(tmp_path / "costs.csv", costs, delimiter=",")
    names = ["balanced_aurc", "balanced_augrc", "cost_aurc", "cost_augrc"]
    words = ["--npz", str(tmp_path / "x.npz"), "--scores", "margin", "--metrics", *names, "naurc"]
    assert command.main([*words, "--costs", str(tmp_path / "costs.csv"), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["further"]
    ordered, predicted = np.sort(logits, axis=1), logits.argmax(1)
    margin = ordered[:, -1] - ordered[:, -2]
    wanted = further_metrics(margin, predicted == labels, costs[labels, predicted], labels)
    assert found["old_fd"]["margin"] == pytest.approx({name: wanted[name] for name in (*names, "naurc")})
    assert list(found["new_fd"]["margin"]) == ["naurc"]  # the labels of OOD samples are unknown
    capsys.readouterr()
    for content, options, sentence in (
        ("a,b", ["--costs"], "must hold rows of numbers with commas between them: could not convert"),
        ("0,1", ["--costs"], "the costs have shape (1, 2) but must be a matrix for 3 classes"),
        ("0,1", [], "cost_aurc and cost_augrc need a matrix of costs; name its file with --costs"),
    ):
        (tmp_path / "costs.csv").write_text(content)
        files = [str(tmp_path / "costs.csv")] if options else []
        assert command.main([*words, *options, *files, "--output", str(tmp_path)]) == 2
        assert sentence in capsys.readouterr().err
