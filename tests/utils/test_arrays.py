"""Arrays and tensors of every kind: read as they are, or refused in one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tal_fast.metrics.calibration import calibration_metrics
from tal_fast.metrics.failure import failure_metrics
from tal_fast.scores.logits import SCORES
from tal_fast.scores.temperature import fit_temperature
from tal_fast.scores.training_statistics import Training
from tal_fast.utils.arrays import as_classes, as_matrix, to_numpy

X = torch.rand(4, 3, generator=torch.Generator().manual_seed(0)) + 0.5
ROWS = np.random.default_rng(0).random((4, 3))


def sparse(layout: str) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some layouts are in beta
        return {"coo": X.to_sparse, "csr": X.to_sparse_csr}[layout]()


def quantized() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)


UNREADABLE: dict[str, Callable[[], Any]] = {
    "sparse": lambda: sparse("coo"),
    "sparse-csr": lambda: sparse("csr"),
    "quantized": quantized,
    "complex": lambda: X.to(torch.complex64),
    "conjugate": lambda: X.to(torch.complex64).conj(),
    "bool": lambda: X > 1,
    "complex-array": lambda: ROWS + 1j,
    "objects": lambda: np.full((4, 3), None),
    "text": lambda: ROWS.astype(str),
    "dates": lambda: np.zeros((4, 3), "M8[D]"),
    "records": lambda: np.zeros((4, 3), [("a", float)]),
    "masked": lambda: np.ma.array(ROWS, mask=ROWS > 0.5),
}
READERS: dict[str, Callable[[Any], Any]] = {
    "matrix": lambda values: as_matrix(values, "logits"),
    "score": SCORES["msp"],
    "features": Training,
    "weight": lambda values: Training(ROWS, weight=values),
    "training-logits": lambda values: Training(ROWS, logits=values),
}
LABEL_READERS: dict[str, Callable[[Any], Any]] = {
    "confidence": lambda values: failure_metrics(values, np.array([1, 0, 1, 0])),
    "outcomes": lambda values: failure_metrics(ROWS[:, 0], values),
    "labels": lambda values: calibration_metrics(ROWS, values),
    "temperature": lambda values: fit_temperature(ROWS, values),
    "training-labels": lambda values: Training(ROWS, labels=values),
}


def refused(read: Callable[[Any], Any], values: Any) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        read(values)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", UNREADABLE)
def test_matrices_that_are_not_real_numbers_are_refused(kind: str, reader: str) -> None:
    refused(READERS[reader], UNREADABLE[kind]())


@pytest.mark.parametrize("reader", LABEL_READERS)
@pytest.mark.parametrize("kind", UNREADABLE)
def test_vectors_that_are_not_real_numbers_are_refused(kind: str, reader: str) -> None:
    values = UNREADABLE[kind]()
    if kind == "bool":
        values = X.to(torch.complex128)[:, 0]
    elif kind not in ("sparse", "sparse-csr", "quantized"):
        values = values[:, 0]
    refused(LABEL_READERS[reader], values)


def test_tensors_without_values_are_refused() -> None:
    for read in (to_numpy, *(READERS[name] for name in ("matrix", "features", "weight"))):
        refused(read, X.to("meta"))
    refused(LABEL_READERS["labels"], torch.zeros(4, dtype=torch.long, device="meta"))


@pytest.mark.parametrize(
    "values",
    [
        torch.complex(-X, X).conj().imag,  # its sign is stored as a flag
        X.to(torch.float8_e4m3fn),
        X.bfloat16(),
        X.clone().requires_grad_(),
        X.long(),
        X.to(torch.uint16),
        X[::2].t(),
        ROWS[::-1, ::-1],
        ROWS.astype(">f4"),
        ROWS.astype(np.float16),
        ROWS.astype(np.longdouble),
        ROWS.tolist(),
        np.ma.array(ROWS),
    ],
    ids=str,
)
def test_real_numbers_of_any_type_are_read_exactly(values: Any) -> None:
    expected = values.detach().double().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    np.testing.assert_array_equal(as_matrix(values, "logits").astype(np.float64), expected.astype(np.float64))
    np.testing.assert_array_equal(to_numpy(SCORES["max_logit"](values)), expected.astype(np.float64).max(1))


def test_classes_are_integers_in_range() -> None:
    assert as_classes(torch.tensor([0, 2], dtype=torch.uint8), 3).tolist() == [0, 2]
    for wrong in ([0, 3], [-1], [0.0], torch.tensor([True])):
        with pytest.raises(ValueError, match=r"labels must be integers in 0\.\.2, the classes"):
            as_classes(wrong, 3)
