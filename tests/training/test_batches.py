"""Training batches: resuming within an epoch, outliers, image sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.data.build import build_data
from tal_fast.training.batches import TrainingBatches
from tests.helpers.training import config

OPTIONS: dict[str, Any] = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "skip_unreadable": True}


def batches(tmp_path: Path, outliers: str | None = "uniform:70", **options: Any) -> TrainingBatches:
    made = config(tmp_path, **options)
    return TrainingBatches(made, build_data(made.data), outliers, made.batch_size, OPTIONS)


def test_an_epoch_resumes_at_any_step_and_outliers_go_on(tmp_path: Path) -> None:
    straight = batches(tmp_path)
    assert (len(straight), straight.num_images) == (6, 200)
    epochs = [list(straight.epoch(epoch)) for epoch in range(2)]
    rest = list(batches(tmp_path).epoch(1, first=4))
    assert len(rest) == 2
    for got, want in zip(rest, epochs[1][4:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    seen = torch.cat([outliers for epoch in epochs for *_, outliers in epoch])
    assert len(seen) == 12 * 32
    assert len(seen[:64].unique(dim=0)) == 64  # an epoch of the outliers, 2 steps of 70 images, has no image twice
    assert not torch.equal(seen[:64], seen[64:128])


def test_without_outliers_a_batch_is_images_labels_and_indices(tmp_path: Path) -> None:
    images, labels, indices = next(batches(tmp_path, outliers=None).epoch(0))
    assert images.shape == (32, 1, 8, 8)
    assert labels.shape == indices.shape == (32,)


def test_images_grow_as_configured(tmp_path: Path) -> None:
    growing = batches(tmp_path, image_sizes=[(0, 6), (2, 8)])
    sides = [next(growing.epoch(epoch))[0].shape[-1] for epoch in range(3)]
    assert sides == [6, 6, 8]
    assert [images.shape for images in growing.images(0, steps=2)] == [(32, 1, 6, 6)] * 2


def test_too_few_outliers_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the outliers uniform:20: a step takes 32 images"):
        batches(tmp_path, outliers="uniform:20")
