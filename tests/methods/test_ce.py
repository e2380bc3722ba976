"""Cross-entropy against PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tal_fast.config.schema import MethodConfig
from tal_fast.data.loader import IGNORED_LABEL
from tests.helpers.training import labelled_batch, method, step_of


def test_ce_is_cross_entropy_of_the_labelled_rows() -> None:
    logits, features, labels = labelled_batch()
    loss, samples = step_of(method(MethodConfig("ce", label_smoothing=0.1)), logits, features, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert samples == {}
    half = step_of(method(MethodConfig("ce")), logits.bfloat16(), features, labels).loss
    assert half.dtype == torch.float32


def test_a_batch_without_labels_has_loss_and_gradient_0() -> None:
    logits, features, labels = labelled_batch()
    logits.requires_grad_()
    loss = step_of(method(MethodConfig("ce")), logits, features, torch.full_like(labels, IGNORED_LABEL)).loss
    loss.backward()
    assert logits.grad is not None
    assert float(loss.detach()) == float(logits.grad.abs().sum()) == 0
