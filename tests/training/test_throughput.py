"""Throughput of a configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tal_fast.loss.reference import feature_statistics
from tal_fast.training import throughput
from tal_fast.training.trainer import Trainer
from tal_fast.utils.distributed import Ranks
from tests.helpers.training import config


@pytest.mark.parametrize(("method", "other"), [("ce", "tal"), ("openmix", "openmix")])
def test_the_throughput_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, other: str) -> None:
    monkeypatch.setattr(throughput, "MAX_STEPS", 4)
    monkeypatch.setattr(throughput, "WARM_UP_STEPS", 1)
    options = {"outliers": "uniform:70"} if method == "openmix" else {}
    report = throughput.measure(config(tmp_path / "x", method, method_options=options), Ranks.start("cpu"))
    assert json.loads(json.dumps(report)) == report
    assert report["turns"] == 4
    assert set(report["step_ms"]) == {"ce", other}
    rates = [report["loader_alone_images_per_s"], report["training_images_per_s"]]
    assert all(rate > 0 for rate in [*rates, *report["compute_alone_images_per_s"].values()])
    assert math.isfinite(report[f"{other}_over_ce_percent"])
    assert report["configuration"]["method"]["name"] == method
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("seconds", [30.0, 0.0])
def test_queues_are_filled_with_the_networks_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(throughput, "MAX_SECONDS", seconds)
    trainer = Trainer(config(tmp_path, "fmfp-tal"))
    trainer.model.train()
    throughput.fill_queues(trainer)
    queue = trainer.method.loss_fn.queue
    assert len(queue) == queue.capacity == 150
    images = next(trainer.batches.epoch(0))[0]
    mean, std = feature_statistics(trainer.network(images)[1].detach())
    for value, found in ((mean, queue.ring.mean), (std, queue.ring.std)):
        assert float(value.min()) * 0.5 < float(found.min()) <= float(found.max()) < 2 * float(value.max())
        assert len(found.unique()) > 100
