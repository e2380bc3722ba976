"""Throughput of a configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

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
    sizes: list[int] = []

    def rate(trainer: Trainer, train: bool) -> tuple[float, float]:
        sizes.append(next(throughput._endless_batches(trainer))[0].shape[-1])
        return 50.0, 0.25

    monkeypatch.setattr(throughput, "_rate", rate)
    monkeypatch.setattr(throughput, "_validation_seconds", lambda trainer: 0.01)
    trainer = Trainer(config(tmp_path, method, epochs=10, validate_every=4, image_sizes=[(0, 8), (4, 10), (12, 16)]))
    found = throughput.expected(trainer)
    images = 200 // 32 * 32
    validated = 3 * len(trainer.data.split("val"))  # after epochs 4, 8 and 10
    statistics = 4 * images if method == "fmfp" else 0  # averages after epochs 7 to 10
    assert found.hours == pytest.approx((10 * images / 50 + 0.01 * (validated + statistics)) / 3600)
    assert (found.images_per_s, found.data_wait, sizes) == (50.0, 0.25, [10])
    other = throughput.expected(trainer, val_images=1000).hours
    assert other == pytest.approx((10 * images / 50 + 0.01 * (3 * 1000 + statistics)) / 3600)


def test_a_stand_in_has_the_numbers_and_the_size_of_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def expected(trainer: Trainer, val_images: int | None) -> throughput.Expected:
        seen.update(data=trainer.config.data, classes=trainer.data.num_classes, val=val_images)
        return throughput.Expected(1.0, 0.0, 1.0)

    monkeypatch.setattr(throughput, "expected", expected)
    monkeypatch.setattr(throughput, "fill_queues", lambda trainer: None)
    data = {"dataset": "cifar100", "crop_area": None, "image_size": None, "channels": 3, "root": str(tmp_path)}
    found = throughput.expected_of(config(tmp_path / "x", data_options=data), Ranks.start("cpu"))
    assert found.note == (
        "on synthetic images in memory, which need no decoding (200 for training, 10,000 for validation, 100 classes), "
        f"as data.root {tmp_path} has no files of cifar100"
    )
    assert (seen["data"].synthetic_images, seen["data"].image_size, seen["data"].train_limit) == (50_000, 32, 200)
    assert (seen["classes"], seen["val"]) == (100, 10_000)
