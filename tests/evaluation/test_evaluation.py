"""The Evaluation object: written to files and read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tal_fast.evaluation.evaluation import read_evaluation, write_evaluation
from tal_fast.metrics.curves import OperatingPoints
from tests.helpers.evaluation import read_json


def test_an_evaluation_is_read_as_it_was_written(evaluated_run: Path, tmp_path: Path) -> None:
    evaluation = read_evaluation(evaluated_run)
    write_evaluation(evaluation, tmp_path)
    assert (tmp_path / "report.json").read_bytes() == (evaluated_run / "report.json").read_bytes()
    with np.load(tmp_path / "samples.npz") as written, np.load(evaluated_run / "samples.npz") as before:
        assert written.files == before.files
        for name in written.files:
            np.testing.assert_array_equal(written[name], before[name])
    assert list(evaluation.settings) == list(evaluation.report["settings"])
    assert evaluation.primary_score == "cosine"
    samples = evaluation.samples
    curve = OperatingPoints(samples.id_scores["energy"], samples.correct).curve
    np.testing.assert_array_equal(evaluation.operating_points["old_fd"]["energy"].curve.risk, curve.risk)


def test_files_of_different_evaluations_are_refused(evaluated_run: Path, tmp_path: Path) -> None:
    for name in ("report.json", "samples.npz"):
        shutil.copy(evaluated_run / name, tmp_path)
    report = read_json(tmp_path)
    del report["samples_sha256"], report["sha256"]  # as version 0.2.0 wrote it
    (tmp_path / "report.json").write_text(json.dumps(report))
    read_evaluation(tmp_path)
    report["counts"]["id_right"] += 1
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match=r"report\.json and samples\.npz in .* are of different evaluations"):
        read_evaluation(tmp_path)
    (tmp_path / "samples.npz").unlink()
    with pytest.raises(ValueError, match=r"there is no .*samples\.npz; evaluate again"):
        read_evaluation(tmp_path)
