"""Random generators."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from tal_fast.utils.rng import rng_state, seed_all, set_rng_state

# ruff: noqa: NPY002 - the global generator of NumPy is what is tested


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]


def test_generators_continue_from_a_saved_state(tmp_path: Path) -> None:
    draw()  # an odd number of normal draws, so that both generators hold one back
    torch.save(rng_state(), tmp_path / "state.pt")
    first = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == first


def test_a_seed_sets_all_generators() -> None:
    seed_all(2**40 + 1)
    first = draw()
    draw()
    seed_all(2**40 + 1)
    assert draw() == first


def test_the_state_of_numpy_is_that_of_now_after_any_draw() -> None:
    steps = [
        np.random.rand,
        np.random.randn,  # keeps a second value back
        np.random.randn,  # takes it, and leaves the words as they are
        lambda: np.random.permutation(700),
        lambda: np.random.seed(3),
        lambda: set_rng_state(saved),
        lambda: None,
    ]
    np.random.randn()
    saved = rng_state()
    np.random.randn()
    rng_state()
    for step in [steps[5], *steps, *(steps[i] for i in np.random.randint(len(steps), size=40))]:
        step()
        name, keys, position, has_gauss, cached = np.random.get_state()
        found = rng_state()["numpy"]
        assert [found[0], *found[2:]] == [name, position, has_gauss, cached]
        assert (found[1].numpy() == keys).all()
