"""Outputs of any model from an .npz file."""

from __future__ import annotations

import io
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast.evaluation.npz import read_npz
from tests.helpers.evaluation import write_npz


def test_all_arrays_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.normal(size=(200, 4)), "ood_noise_features": rng.normal(size=(90, 4)),
        "ood_a_b_logits": rng.normal(size=(3, 5)), "shift_fog_logits": rng.normal(size=(60, 5)),
        "shift_fog_labels": rng.integers(5, size=60), "train_features": rng.normal(size=(30, 4)),
        "train_labels": rng.integers(5, size=30), "fc_weight": rng.normal(size=(5, 4)),
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        inputs = read_npz(write_npz(tmp_path / "outputs.npz", **arrays, fc_wieght=np.zeros(3)))
    assert "has arrays with names that are not used: fc_wieght" in caplog.text
    assert list(inputs.ood) == ["noise", "a_b"]
    assert inputs.ood["noise"].features is not None
    assert inputs.ood["a_b"].labels.tolist() == [-1] * 3
    np.testing.assert_array_equal(inputs.shifts["fog"].labels, arrays["shift_fog_labels"])
    assert inputs.shifts["fog"].features is None
    assert inputs.training is not None
    np.testing.assert_array_equal(inputs.training.weight, arrays["fc_weight"])
    assert inputs.training.bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": None}, "has no 'logits'; it has labels, ood_noise_logits"),
        ({"labels": None}, "has no 'labels'; it has logits"),
        ({"labels": np.zeros(7, int)}, "labels must be a label for each of 200 samples, not of shape (7,)"),
        ({"labels": np.full(200, 5)}, "labels must be integers in 0..4, the classes, not int64 from 5 to 5"),
        ({"labels": np.arange(200) - 1}, "not int64 from -1 to 198"),
        (
            {"labels": np.zeros(200)},
            "labels must be integers in 0..4, the classes, not float64 from 0.0 to 0.0",
        ),
        ({"logits": np.zeros(200)}, "logits must be (n, C) with C >= 1, not of shape (200,)"),
        ({"logits": np.full((200, 5), np.nan)}, "the logits of sample 0 of 'logits' are not finite"),
        ({"ood_noise_logits": np.zeros((90, 4))}, "ood_noise_logits has 4 columns but logits has 5"),
        ({"features": np.zeros((7, 3))}, "features has 7 samples but its logits have 200"),
        ({"shift_fog_logits": np.zeros((4, 5))}, "has 'shift_fog_logits' but no 'shift_fog_labels'"),
        (
            {"shift_fog_logits": np.zeros((4, 5)), "shift_fog_labels": np.arange(3)},
            "shift_fog_labels must be a label for each of 4 samples, not of shape (3,)",
        ),
        ({"shift_fog_logits": np.zeros((4, 6)), "shift_fog_labels": np.arange(4)}, "has 6 columns but logits has 5"),
        ({"logits": np.array([{}, {}])}, "cannot be read as .npz (it holds objects"),
        ({"logits": np.zeros((200, 5), complex)}, "logits must be real numbers, not complex128"),
        ({"train_features": np.ones((9, 4), complex)}, "training features must be real numbers, not complex128"),
        (
            {"train_features": np.ones((9, 4)), "fc_weight": np.ones((5, 4)) + 1j},
            "training weight must be real numbers, not complex128",
        ),
        (
            {"train_features": np.ones((9, 4)), "fc_weight": np.ones((5, 4)), "fc_bias": np.full(5, np.nan)},
            "training bias must be finite",
        ),
        ({"train_features": np.ones((9, 4)), "train_labels": np.ones(9)}, "training labels must be integers, not fl"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        read_npz(write_npz(tmp_path / "outputs.npz", **changes))
    assert message in str(error.value)


def test_probabilities_taken_for_logits_are_remarked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    p = np.random.default_rng().dirichlet(np.ones(5), 200)
    read_npz(
        write_npz(
            tmp_path / "outputs.npz",
            logits=p.astype(np.float16),
            shift_a_logits=np.log(p),
            shift_a_labels=np.zeros(200, int),
        )
    )
    assert [message.partition(" but")[0] for message in caplog.messages] == [
        f"logits of {tmp_path / 'outputs.npz'} are probabilities"
    ]
    caplog.clear()
    read_npz(write_npz(tmp_path / "outputs.npz", logits=10 * p, ood_noise_logits=np.log(p)))
    read_npz(
        write_npz(tmp_path / "outputs.npz", logits=np.ones((200, 1)), labels=np.zeros(200, int), ood_noise_logits=None)
    )
    assert caplog.messages == []


@pytest.mark.parametrize("shape", [(10**9, 1000), (10**7, 10**5), (2**62, 4), (10**30, 3), (-1, 3)])
def test_arrays_that_claim_more_than_the_memory_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(npy, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "outputs.npz", "w") as file:
        file.writestr("logits.npy", npy.getvalue() + bytes(64))
    with pytest.raises(ValueError, match=r"cannot be read as \.npz \("):
        read_npz(tmp_path / "outputs.npz")


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("logits")
    (tmp_path / "empty.npz").touch()
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "empty.npz", "array.npy"):
        with pytest.raises(ValueError, match=r"cannot be read as \.npz"):
            read_npz(tmp_path / name)
    with pytest.raises(ValueError, match="there is no file"):
        read_npz(tmp_path / "gone.npz")


def test_outputs_without_samples_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    empty = {"logits": np.zeros((0, 3)), "labels": np.zeros(0, int), "ood_far_logits": np.ones((2, 3))}
    np.savez(tmp_path / "x.npz", **empty)
    read_npz(tmp_path / "x.npz")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == f"logits of {tmp_path / 'x.npz'} has no samples, so that no metric over it is defined"


def test_damaged_files_are_named_without_talk_of_pickle(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:3], b"", b"text", whole[40:]):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"x.npz cannot be read as .npz \(.*\); write it with numpy.savez"
        ) as problem:
            read_npz(path)
        assert "pickle" not in str(problem.value)


def test_a_score_named_as_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^score_x/y has a '/' in the score's name, .*; rename it$"):
        read_npz(write_npz(tmp_path / "x.npz", **{"score_x/y": np.zeros(200)}))


def test_a_score_of_a_set_alone_is_named_as_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_npz(write_npz(tmp_path / "x.npz", ood_noise_score_mine=np.zeros(90)))
    assert caplog.messages == [f"{tmp_path / 'x.npz'} has arrays with names that are not used: ood_noise_score_mine"]
