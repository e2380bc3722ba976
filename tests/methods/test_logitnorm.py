"""LogitNorm against its definition in NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tests.helpers.training import labelled_batch, method, step_of


def test_logitnorm_is_its_definition() -> None:
    logits, features, labels = labelled_batch()
    losses = []
    for z, y in zip(logits.double().numpy(), labels.tolist(), strict=True):
        scaled = z / (0.3 * (np.sqrt((z**2).sum()) + 1e-7))
        if y != IGNORED_LABEL:
            losses.append(np.log(np.exp(scaled).sum()) - scaled[y])
    loss = step_of(method(MethodConfig("logitnorm", options={"tau": 0.3})), logits, features, labels).loss
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_logitnorm_of_huge_logits() -> None:
    logits, features, labels = labelled_batch()
    losses = [
        float(step_of(method(MethodConfig("logitnorm")), logits * size, features, labels).loss) for size in (1.0, 1e25)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
