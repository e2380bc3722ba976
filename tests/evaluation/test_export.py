"""Selective classifiers and their exported programs: the threshold accepts the samples that it was chosen to accept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tal_fast.config.schema import MethodConfig
from tal_fast.evaluation.export import OnnxGraph, SelectiveClassifier, TorchGraph, agreement, onnx_session
from tal_fast.evaluation.selective import choose_threshold
from tal_fast.scores.logits import SCORES
from tests.helpers.training import method


class Logits(nn.Module):
    """Images whose pixels are the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def tied_logits(samples: int = 3000, classes: int = 10) -> tuple[Tensor, Tensor]:
    """80 different rows of logits on a coarse grid, a third with a saturated softmax, and mostly correct labels."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-2, 3, size=(80, classes)).astype(np.float32)
    gap = rng.choice([2, 3, 40], size=80)
    rows[np.arange(80), rng.integers(classes, size=80)] = 2 + gap
    index = rng.integers(80, size=samples)
    logits = rows[index]
    wrong = rng.random(samples) < 0.4 / gap[index]
    return torch.from_numpy(logits), torch.from_numpy((logits.argmax(1) + wrong) % classes)


@pytest.mark.parametrize("score", SCORES)
def test_tied_samples_are_accepted_alike_by_every_user_of_a_score(
    score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, labels = tied_logits()
    images = logits[:, None, :, None]
    values = SCORES[score](logits.numpy())
    assert len(np.unique(values)) <= 80
    chosen = choose_threshold(values, logits.argmax(1).eq(labels), risk=0.1)
    assert 0 < chosen.accepted < len(labels)
    # The threshold is the score of other samples, which must not be accepted.
    assert (values == chosen.threshold).sum() > 1

    def accepted_and_errors(accept: Tensor, prediction: Tensor) -> tuple[int, int]:
        return int(accept.sum()), int((accept & (prediction != labels)).sum())

    classifier = SelectiveClassifier(Logits(), score, chosen.threshold)
    program = tmp_path / "selective.pt2"
    TorchGraph(SelectiveClassifier(Logits(), score, 0.0), images[:2]).save(program, chosen.threshold, {})
    modules: tuple[Callable[[Tensor], tuple[Tensor, ...]], ...] = classifier, torch.export.load(program).module()
    for module in modules:
        for size in (3000, 512, 64, 1):
            parts = [module(batch) for batch in (images if size > 1 else images[:50]).split(size)]
            prediction, confidence, accept = (torch.cat(column) for column in zip(*parts, strict=True))
            np.testing.assert_array_equal(confidence.numpy(), values[: len(confidence)])
            if size > 1:
                assert accepted_and_errors(accept, prediction) == (chosen.accepted, chosen.errors), size
    validation = method(MethodConfig("ce"))
    monkeypatch.setattr(type(validation), "score", score)
    assert accepted_and_errors(validation.confidence(logits) > chosen.threshold, logits.argmax(1)) == (
        chosen.accepted, chosen.errors,
    )  # fmt: skip


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) if images.sum().item() > 0 else -images.flatten(1)


def test_a_model_that_cannot_be_exported_is_named_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="torch.export cannot take the model"):
        TorchGraph(SelectiveClassifier(Branching(), "msp", 0.5), torch.ones(2, 1, 2, 2))


def test_an_unknown_score_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown score 'knn'"):
        SelectiveClassifier(Branching(), "knn", 0.5)


@pytest.mark.parametrize("score", SCORES)
def test_an_onnx_graph_accepts_by_its_own_scores(score: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    logits, labels = tied_logits(500)
    images = logits[:, None, :, None]
    graph = OnnxGraph(SelectiveClassifier(Logits(), score, 0.0), images[:2])
    prediction, confidence = graph(images)
    np.testing.assert_allclose(confidence.numpy(), SCORES[score](logits.numpy()), rtol=2**-32)
    chosen = choose_threshold(confidence.numpy(), prediction.eq(labels), risk=0.1)
    assert 0 < chosen.accepted < 500
    graph.save(tmp_path / "a.onnx", chosen.threshold, {"class_names": ["é", "b"], "threshold": chosen.threshold})
    session = onnx_session(str(tmp_path / "a.onnx"))
    assert session.get_modelmeta().custom_metadata_map["class_names"] == '["\\u00e9", "b"]'
    for size in (500, 17, 1):
        parts = [session.run(None, {"images": batch.numpy()}) for batch in images.split(size)]
        classes, _, accepted, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
        assert accepted.sum() == chosen.accepted
        assert (classes[accepted] != labels.numpy()[accepted]).sum() == chosen.errors
        np.testing.assert_array_equal(outputs, logits.numpy())


def test_decisions_may_differ_within_the_bound_alone() -> None:
    reference = np.array([0.1, 0.5, 0.50005, 0.9])
    found = agreement(
        np.array([0, 1, 1, 2]), reference - np.array([0, 0, 6e-5, 0]), np.array([0, 1, 2, 2]), reference, 0.5, 1e-4
    )
    assert (found["images"], found["inside"], found["decisions_differ"], found["classes_differ"]) == (4, 2, 1, 1)
    assert found["largest_difference"] == pytest.approx(6e-5)
    with pytest.raises(ValueError, match=r"for 1 of 4 images whose score is further than 0\.0001"):
        agreement(*[np.zeros(4, int), reference - np.array([0, 0, 0, 0.5]), np.zeros(4, int), reference], 0.5, 1e-4)
