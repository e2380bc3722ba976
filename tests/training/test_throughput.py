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


@pytest.mark.parametrize("method", ["ce", "fmfp"])
def test_the_expected_hours_are_of_all_steps_validations_and_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    rates = {0: 100.0, 4: 50.0}  # images a second; larger images from epoch 4 on
    monkeypatch.setattr(throughput, "_rate", lambda trainer, train, epoch: (rates[epoch], 0.5 if epoch else 0.0))
    monkeypatch.setattr(throughput, "_validation_seconds", lambda trainer: 0.01)
    run = config(tmp_path, method, epochs=10, validate_every=4, image_sizes=[(0, 8), (4, 10), (12, 16)])
    trainer = Trainer(run)
    found = throughput.expected(trainer)
    images = 200 // 32 * 32
    steps = (4 * images / 100, 6 * images / 50)
    validated = 3 * len(trainer.data.split("val"))  # after epochs 4, 8 and 10
    statistics = 4 * images if method == "fmfp" else 0  # averages after epochs 7 to 10
    assert found.hours == pytest.approx((sum(steps) + 0.01 * (validated + statistics)) / 3600)
    assert found.images_per_s == pytest.approx(10 * images / sum(steps))
    assert found.data_wait == pytest.approx(0.5 * steps[1] / sum(steps))
    assert throughput.expected(trainer, val_images=1000).hours - found.hours == pytest.approx(
        0.01 * 3 * (1000 - validated / 3) / 3600
    )


def test_a_stand_in_has_the_numbers_and_the_size_of_the_data_set(tmp_path: Path) -> None:
    absent = {"dataset": "cifar100", "crop_area": None, "image_size": None, "channels": 3, "train_limit": 300}
    data = throughput.stand_in(config(tmp_path, data_options=absent)).data
    assert (data.dataset, data.synthetic_images, data.synthetic_classes, data.image_size) == (
        "synthetic",
        50_000,
        100,
        32,
    )
    assert (data.train_limit, data.root) == (300, None)
