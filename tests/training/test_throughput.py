"""Throughput of a configuration."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tal_fast.config.schema import MethodConfig
from tal_fast.training import throughput
from tal_fast.utils.distributed import Ranks
from tests.helpers.training import config
from tests.helpers.training import method as make_method


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


def test_queues_are_filled_before_steps_are_measured() -> None:
    method = make_method(MethodConfig("fmfp-tal"))
    throughput.fill_queues(method)
    assert len(method.loss_fn.queue) == method.loss_fn.queue.capacity
