"""Random generators."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from tal_fast.utils.rng import rng_state, seed_all, set_rng_state


def draw() -> list[float]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]  # noqa: NPY002


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
