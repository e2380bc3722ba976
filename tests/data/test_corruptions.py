"""Built-in image corruptions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tal_fast.config.names import CORRUPTIONS
from tal_fast.data.corruptions import Corruption
from tal_fast.data.loader import ImageFormat, Normalizer

RNG = np.random.default_rng(0)


def photo(channels: int) -> np.ndarray:
    from sklearn.datasets import load_sample_image

    image = Image.fromarray(load_sample_image("china.jpg")).crop((100, 50, 400, 350)).resize((64, 64))
    return np.asarray(image.convert("RGB" if channels == 3 else "L")).reshape(64, 64, channels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruptions_grow_with_severity(kind: str, channels: int) -> None:
    image = photo(channels)
    distance = []
    for severity in range(1, 6):
        found = Corruption(kind, severity).image(image, 3)
        assert (found.shape, found.dtype) == (image.shape, np.uint8)
        np.testing.assert_array_equal(found, Corruption(kind, severity).image(image, 3))
        distance.append(np.sqrt(np.mean((found.astype(float) - image) ** 2)))
    assert distance[0] > 1
    assert all(np.diff(distance) > 0)


def test_effect_of_each_corruption() -> None:
    image, flat = photo(3).astype(float), np.full((64, 64, 3), 100, np.uint8)
    noise = Corruption("gaussian-noise", 1).image(flat, 0) - 100.0
    assert noise.std() == pytest.approx(0.04 * 255, rel=0.03)
    assert np.abs(noise.mean()) < 0.5
    assert (Corruption("brightness", 3).image(flat, 0) == round(100 + 0.15 * 255)).all()
    contrast = Corruption("contrast", 2).image(photo(3), 0)
    assert contrast.std(axis=(0, 1)) == pytest.approx(0.5 * image.std(axis=(0, 1)), rel=0.01)
    blocks = Corruption("pixelate", 3).image(photo(3), 0)
    assert (blocks[::2, ::2] == blocks[1::2, 1::2]).all()
    for kind, change in (("blur", 0), ("pixelate", 0), ("contrast", 0), ("jpeg", 4)):
        assert np.abs(Corruption(kind, 5).image(flat, 0) - 100.0).max() <= change, kind


def test_noise_depends_on_seed_and_index_alone() -> None:
    image = photo(1)
    base = Corruption("gaussian-noise", 2, seed=1).image(image, 5)
    assert (Corruption("gaussian-noise", 2, seed=1).image(image, 6) != base).any()
    assert (Corruption("gaussian-noise", 2, seed=2).image(image, 5) != base).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_corrupted_like_its_images(channels: int) -> None:
    mean, std = [0.4, 0.5, 0.3][:channels], [0.2, 0.3, 0.25][:channels]
    pixels = RNG.integers(256, size=(5, 16, 16, channels), dtype=np.uint8)
    corruption = Corruption("jpeg", 4)
    indices = torch.tensor([3, 0, 4, 1, 2])
    normalize = Normalizer(ImageFormat(1 if channels == 1 else 3, mean, std, torch.device("cpu")))
    batch = (normalize(torch.from_numpy(pixels)), torch.arange(5), indices)
    ((images, labels, same),) = corruption.of_batches([batch], mean, std)
    want = np.stack([corruption.image(p, int(i)) for p, i in zip(pixels, indices, strict=True)])
    torch.testing.assert_close(images, normalize(torch.from_numpy(want)))
    assert labels.tolist() == list(range(5))
    assert same is indices
