"""A run on shards, stopped within an epoch, and its evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tal_fast.data import builtin
from tal_fast.data.pack import pack
from tal_fast.evaluation.sources import evaluate_run
from tal_fast.training.trainer import Trainer
from tests.helpers.training import assert_resumes_to_the_bit, config, one_thread

__all__ = ["one_thread"]


def test_a_run_on_shards_resumes_within_an_epoch_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = builtin.digits_folder()
    pack(digits, tmp_path / "shards", shard_mb=0.05)
    pack(digits / "ood" / "photos", tmp_path / "photos", split="photos")

    def run(output: str, **options: Any) -> Trainer:
        data = {
            "dataset": "webdataset",
            "root": str(tmp_path / "shards"),
            "ood": {"photos": f"webdataset:{tmp_path}/photos"},
        }
        return Trainer(config(tmp_path / output, epochs=2, data_options=data, **options))

    assert_resumes_to_the_bit(run, tmp_path, monkeypatch, steps=12)

    evaluation = evaluate_run(tmp_path / "parts", typicalness=False)
    assert evaluation is not None
    assert evaluation.report["counts"]["id"] == 896
    assert list(evaluation.report["counts"]["ood"]) == ["photos"]
    assert "cannot be read" not in (tmp_path / "parts" / "report.html").read_text()  # its images

    pack(digits, tmp_path / "other", shard_mb=0.1)  # the same images in another order
    data = {"dataset": "webdataset", "root": str(tmp_path / "other")}
    with pytest.raises(ValueError, match="the 200 training images are not the 200 that"):
        Trainer(config(tmp_path / "parts", epochs=2, resume="auto", data_options=data))
