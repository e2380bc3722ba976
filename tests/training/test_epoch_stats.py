"""Statistics of an epoch: sums on the device, means, histograms."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tal_fast.config.schema import Config, MethodConfig
from tal_fast.training.epoch_stats import BINS, EpochSums, Histogram, percentile_columns
from tal_fast.training.runtime import Runtime
from tal_fast.training.train_step import TrainStep
from tests.helpers.training import method as make_method

CPU = torch.device("cpu")


def test_sums_leave_out_rows_without_an_image() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images[:, 0, 0], images[:, 0, 0].abs()

    method = make_method(MethodConfig("tal", options={"t_min": 2.0, "t_max": 20.0, "t_wrong": 30.0}))
    method.loss_fn.queue.push(torch.rand(20), torch.rand(20))
    step = TrainStep(Fixed(), method, Runtime.resolve(Config(device="cpu"), CPU))
    images, labels = torch.randn(9, 1, 1, 5), torch.randint(5, (9,))
    labels[[2, 7]] = -100
    logits = images[:, 0, 0]
    want, stats = copy.deepcopy(method.loss_fn)(logits, logits.abs(), labels, return_stats=True)
    loss, sums = step(images, labels, torch.arange(9))
    assert loss == want
    epoch = EpochSums(method, CPU)
    epoch.add(sums)
    epoch.add(sums)
    assert float(epoch.total[0]) == 14
    means = epoch.means(epoch.total)
    assert means["train_loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert means["train_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).double().sum() / 7))
    histograms = epoch.histograms(epoch.total)
    for name, (low, high) in {"typicalness": (0.0, 1.0), "temperature": (2.0, 30.0)}.items():
        values = getattr(stats, name)[labels >= 0]
        assert means[name] == pytest.approx(float(values.double().mean()), rel=1e-6)
        assert histograms[name].counts == (2 * torch.histc(values.double(), BINS, low, high)).tolist()
    assert math.isnan(epoch.means(torch.zeros_like(epoch.total))["train_loss"])


def test_sums_of_an_older_version_lack_the_newer_values() -> None:
    sums = EpochSums(make_method(MethodConfig("tal")), CPU)
    older = torch.arange(1.0, len(sums.total))
    sums.load(older)
    assert torch.equal(sums.total[:-1], older.double())
    assert math.isnan(sums.means(sums.total)["accepted"])
    assert sums.means(sums.total)["train_accuracy"] == 3


def test_quantiles_of_a_histogram_are_accurate_to_a_bin() -> None:
    values = torch.rand(5000, dtype=torch.float64) ** 2 * 3 + 1
    counts = torch.histc(values, BINS, 1.0, 4.0).tolist()
    histogram = Histogram(1.0, 4.0, counts)
    for share in (0.01, 0.1, 0.5, 0.9, 1.0):
        assert histogram.quantile(share) == pytest.approx(float(values.quantile(share)), abs=3 / BINS)
    assert math.isnan(Histogram(0, 1, [0.0, 0.0]).quantile(0.5))
    assert Histogram(0, 1, [0, 4, 0, 0]).quantile(0.5) == pytest.approx(0.375)


def test_percentile_columns_are_named_after_the_value() -> None:
    columns = percentile_columns({"x": Histogram(0, 1, [1.0] * 100)})
    assert columns == pytest.approx({"x_p10": 0.1, "x_p50": 0.5, "x_p90": 0.9})
