"""Order, shares, crops and augmentation of the images of an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tal_fast.data.sampler import Augmentation, Plan, central_boxes, random_boxes


def plan(num_samples: int, batch_size: int, **options: Any) -> Plan:
    return Plan(np.full((num_samples, 2), 32, np.int32), batch_size, **options)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_samples", [12, 13, 37])
def test_training_shards_are_one_shuffled_order(world: int, num_samples: int) -> None:
    batch = 12 // world
    whole = [b.indices for b in plan(num_samples, 12, training=True, seed=5).batches(epoch=2)]
    ranks = [plan(num_samples, batch, training=True, seed=5, rank=r, world_size=world) for r in range(world)]
    assert {len(rank) for rank in ranks} == {num_samples // 12} == {len(whole)}
    steps = zip(*(rank.batches(epoch=2) for rank in ranks), strict=True)
    for together, parts in zip(whole, steps, strict=True):
        assert np.concatenate([part.indices for part in parts]).tolist() == together.tolist()
        assert {part.indices.size for part in parts} == {batch}  # never a short or a padded batch
    seen = np.concatenate(whole)
    assert len(set(seen.tolist())) == len(seen)  # no image twice


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("over", [0, 1, 4])
def test_ranks_take_equally_many_full_steps_of_different_images(world: int, over: int) -> None:
    """Padded shards would repeat an image if ``over`` images are left for the last step."""
    total, batch = 6 * world + min(over, world - 1), 3
    epochs = []
    for epoch in range(2):
        ranks = [
            [b.indices.tolist() for b in plan(total, batch, training=True, rank=r, world_size=world).batches(epoch)]
            for r in range(world)
        ]
        assert [len(steps) for steps in ranks] == [2] * world
        assert {len(step) for steps in ranks for step in steps} == {batch}
        seen = [i for steps in ranks for step in steps for i in step]
        assert len(set(seen)) == len(seen) == 6 * world
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_each_epoch_is_reshuffled_from_the_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate([b.indices for b in plan(60, 20, training=True, seed=seed).batches(epoch)]).tolist()

    assert order(1, 0) == order(1, 0)
    assert sorted(order(1, 0)) == list(range(60))
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6


def test_start_step_skips_the_steps_before_it() -> None:
    p = plan(40, 8, training=True, seed=3, augmentation=Augmentation(crop_area=(0.2, 1.0), flip=True, shift=2))
    whole = list(p.batches(epoch=4))
    for start in range(6):
        rest = list(p.batches(epoch=4, start_step=start))
        assert len(rest) == 5 - start
        for got, want in zip(rest, whole[start:], strict=True):
            for name in ("indices", "boxes", "mirror", "shift"):
                assert np.array_equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [1, 2, 7, 16])
def test_evaluation_sees_each_image_once(world: int, num_samples: int) -> None:
    ranks = [plan(num_samples, 3, rank=r, world_size=world) for r in range(world)]
    batches = [[b.indices for b in rank.batches()] for rank in ranks]
    assert [len(b) for b in batches] == [len(rank) for rank in ranks]
    seen = [i for rank in batches for batch in rank for i in batch.tolist()]
    assert sorted(seen) == list(range(num_samples))


def test_the_crop_of_an_image_does_not_depend_on_its_place_in_the_order() -> None:
    options: dict[str, Any] = {"augmentation": Augmentation(crop_area=(0.1, 1.0), flip=True), "training": True}

    def crops(p: Plan) -> dict[int, list[int]]:
        return {
            int(i): [*box.tolist(), int(m)]
            for b in p.batches(1)
            for i, box, m in zip(b.indices, b.boxes, b.mirror, strict=True)
        }

    one = crops(plan(30, 5, seed=7, **options))
    two = crops(plan(30, 5, seed=7, world_size=2, **options)) | crops(
        plan(30, 5, seed=7, rank=1, world_size=2, **options)
    )
    assert one == two
    assert len({tuple(v) for v in one.values()}) > 20
    assert {v[4] for v in one.values()} == {0, 1}


def test_central_boxes() -> None:
    sizes = np.array([[256, 256], [100, 200], [201, 100], [1, 1]], float)
    assert central_boxes(sizes, 0.875).tolist() == [[16, 16, 224, 224], [6, 56, 88, 88], [56, 6, 88, 88], [0, 0, 1, 1]]
    assert central_boxes(sizes, 1.0).tolist() == [[0, 0, 256, 256], [0, 50, 100, 100], [50, 0, 100, 100], [0, 0, 1, 1]]


def test_random_boxes_lie_within_the_image_and_have_the_given_area_and_shape() -> None:
    random = np.random.default_rng(0).random((4000, 4), dtype=np.float32)
    sizes = np.random.default_rng(1).integers(1, 700, size=(4000, 2)).astype(float)
    top, left, height, width = random_boxes(sizes, (0.08, 1.0), (0.75, 4 / 3), random).T
    assert (np.minimum(top, left) >= 0).all()
    assert (np.minimum(height, width) >= 1).all()
    assert (top + height <= sizes[:, 0]).all()
    assert (left + width <= sizes[:, 1]).all()
    # Without narrowing, areas are uniform and aspect ratios log-uniform over their ranges.
    square = np.full((4000, 2), 1000.0)
    _, _, height, width = random_boxes(square, (0.1, 0.5), (0.5, 2.0), random).T
    area, shape = height * width / 1e6, np.log2(width / height)
    assert (abs(area.mean() - 0.3) < 0.01, abs(area.min() - 0.1) < 0.01, abs(area.max() - 0.5) < 0.01) == (True,) * 3
    assert (abs(shape.mean()) < 0.05, abs(shape.min() + 1) < 0.02, abs(shape.max() - 1) < 0.02) == (True,) * 3
    whole = random_boxes(square[:1], (1.0, 1.0), (1.0, 1.0), random[:1])
    assert whole.tolist() == [[0, 0, 1000, 1000]]


def test_balanced_sampling_reads_all_classes_equally_often() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 3], [2000, 300, 7]))  # class 2 has no image
    options: dict[str, Any] = {"training": True, "seed": 3, "balanced": labels}
    (whole,) = (step.indices for step in plan(len(labels), len(labels), **options).batches(epoch=1))
    assert np.bincount(labels[whole], minlength=4) / len(labels) == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3], abs=0.03)
    assert all((whole == image).sum() > 60 for image in np.flatnonzero(labels == 3))
    assert len(set(whole[labels[whole] == 1].tolist())) > 250  # images of a class are drawn evenly
    ranks = [plan(len(labels), 50, **options, rank=rank, world_size=2) for rank in range(2)]
    steps = zip(*(rank.batches(epoch=1) for rank in ranks), strict=True)
    together = np.concatenate([part.indices for step in steps for part in step])
    assert together.tolist() == whole[: len(together)].tolist()
    assert len(ranks[0]) == len(labels) // 100


@pytest.mark.parametrize("world", [1, 2, 3])
def test_repeats_read_an_image_several_times_in_one_batch_of_all_ranks(world: int) -> None:
    augmentation = Augmentation((0.2, 0.9), (0.5, 2.0), flip=True, draws=2)
    ranks = [
        plan(50, 12 // world, training=True, repeats=3, rank=rank, world_size=world, augmentation=augmentation)
        for rank in range(world)
    ]
    seen: list[int] = []
    for parts in zip(*(rank.batches(epoch=4) for rank in ranks), strict=True):
        indices = np.stack([part.indices for part in parts], axis=1).ravel()
        assert indices[::3].tolist() == indices[1::3].tolist() == indices[2::3].tolist()
        if world == 3:  # the three readings are on different ranks
            assert parts[0].indices.tolist() == parts[1].indices.tolist() == parts[2].indices.tolist()
        boxes = np.stack([part.boxes for part in parts], axis=1).reshape(12, 4)
        draws = np.stack([part.draws for part in parts if part.draws is not None], axis=1).reshape(12, 2)
        assert len(np.unique(draws, axis=0)) == 12
        assert len(np.unique(boxes, axis=0)) > 8  # each reading has a crop of its own
        seen += indices[::3].tolist()
    assert len(set(seen)) == len(seen) == 16
    assert len(ranks[0]) == 4


def test_batch_larger_than_the_images_is_refused() -> None:
    with pytest.raises(ValueError, match="a step takes 14 images .* only 13 training images; lower batch_size"):
        plan(13, 7, training=True, world_size=2)
    with pytest.raises(ValueError, match="batch size is 0"):
        plan(13, 0)
