"""Warning when correctly classified samples do not enter TAL's queue."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch

from tal_fast import TALLoss
from tal_fast.loss import watch
from tal_fast.loss.watch import QueueWatch
from tests.helpers.backends import device_of, every_backend


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 3)


def warnings_of(loss_fn: TALLoss, steps: int, shift: float, correct: int = 8, **kwargs: Any) -> list[str]:
    """Messages in so many steps of eight samples, of which so many are correct, their logits shifted."""
    device = loss_fn.queue.device
    logits, labels = torch.eye(8, device=device) * 2 + shift, torch.arange(8, device=device)
    labels[correct:] = (labels[correct:] + 1) % 8
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            loss_fn(logits, torch.rand(8, 4, device=device), labels, **kwargs)
    return [str(warning.message) for warning in caught]


@every_backend
def test_a_queue_that_correct_samples_do_not_enter_is_said_once(backend: str) -> None:
    loss_fn = TALLoss(queue_size=50, confidence_threshold=0.0, backend=backend).to(device_of(backend))
    (message,) = warnings_of(loss_fn, 6, shift=-9.0)
    assert message.startswith("only 0% of the correctly classified samples of steps 3 and 6 enter TAL's queue")
    assert "cosine is not above confidence_threshold = 0;" in message
    assert "set confidence_threshold to -1" in message
    assert not warnings_of(loss_fn, 6, shift=-9.0)


@pytest.mark.parametrize("direct", [False, True])
def test_a_healthy_queue_is_not_complained_about(direct: bool) -> None:
    loss_fn = TALLoss(queue_size=8)  # the queue's next slot is the same after every step
    if direct:
        loss_fn.forward = lambda *args: loss_fn.loss_and_gradient(*args)[0]  # type: ignore[method-assign]
    assert not warnings_of(loss_fn, 6, shift=-9.0)
    assert loss_fn.watch is not None
    assert loss_fn.watch.steps == 6


def test_nothing_correct_is_said_where_the_queue_stands_still() -> None:
    (message,) = warnings_of(TALLoss(queue_size=50), 6, 0.0, correct=0)
    assert message.startswith("no sample of steps 3 and 6 is classified correctly and nothing enters TAL's queue")
    loss_fn = TALLoss(queue_size=50)  # of many classes few are correct at first, and none in the steps looked at
    for step in range(1, 13):
        assert not warnings_of(loss_fn, 1, 0.0, correct=0 if step % 3 == 0 else 1)


def test_no_look_without_a_push_in_eval_mode_or_when_switched_off() -> None:
    loss_fn = TALLoss(queue_size=50, confidence_threshold=0.0)
    assert not warnings_of(loss_fn, 9, shift=-9.0, push=False)
    assert not warnings_of(loss_fn.eval(), 9, shift=-9.0)
    loss_fn.train().watch = None
    assert not warnings_of(loss_fn, 9, shift=-9.0)


def test_the_watch_is_copied_with_the_loss() -> None:
    loss_fn = TALLoss(queue_size=50, confidence_threshold=0.0)
    assert not warnings_of(loss_fn, 5, shift=-9.0)
    for other in (copy.deepcopy(loss_fn), pickle.loads(pickle.dumps(loss_fn))):
        assert len(warnings_of(other, 1, shift=-9.0)) == 1


@pytest.mark.parametrize(
    ("correct", "accepted", "threshold", "part"),
    [
        (0.9, 0.46, 0.0, None),
        (0.9, 0.44, 0.5, "only 49% of the correctly classified samples of epoch 1 enter"),
        (0.9, 0.44, 0.5, "not above method.options.confidence_threshold = 0.5"),
        (0.9, 0.1, -1.0, "logits or features are not finite"),
        (0.9, float("nan"), 0.0, None),
        (0.0, 0.0, 0.0, "lower the learning rate or clip"),
    ],
)
def test_complaints_name_the_cause(correct: float, accepted: float, threshold: float, part: str | None) -> None:
    sentence = QueueWatch("method.options.").judge(correct, accepted, threshold, "of epoch 1")
    assert (sentence is None) == (part is None)
    assert part is None or part in str(sentence)
