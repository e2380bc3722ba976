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


def swapped(backend: str, width: int, classes: int, steps: int) -> list[str]:
    """Messages in so many steps with random labels, where the features are given as logits."""
    device = device_of(backend)
    loss_fn = TALLoss(queue_size=50, backend=backend).to(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            labels = torch.randint(classes, (64,), device=device)
            loss_fn(torch.rand(64, width, device=device), torch.randn(64, classes, device=device), labels)
    assert {warning.filename for warning in caught} <= {__file__}  # the caller's line
    return [str(warning.message) for warning in caught]


@pytest.fixture
def _late_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "INTERVAL", 500)


@pytest.mark.usefixtures("_late_interval")
@every_backend
def test_features_in_the_place_of_logits_are_noticed_once(backend: str) -> None:
    (message,) = swapped(backend, width=48, classes=7, steps=64 if device_of(backend).type == "cuda" else 3)
    assert message.startswith("the labels go up to 6, which fits the features' width 7, not the logits' 48: logits and")
    assert message.endswith("features look swapped; call loss_fn(logits, features, labels)")


@pytest.mark.usefixtures("_late_interval")
def test_the_largest_label_of_several_looks_counts() -> None:
    labels = [torch.tensor([0, 1, 2]), torch.tensor([3, 1, 4]), torch.tensor([0, 2, 1])]
    loss_fn, logits, features = TALLoss(), torch.rand(3, 900), torch.randn(3, 5)
    loss_fn(logits, features, labels[0])
    with pytest.warns(RuntimeWarning, match="the labels go up to 4"):
        loss_fn(logits, features, labels[1])
    ignored = TALLoss(ignore_index=4)  # is no label
    for batch in labels[:3]:
        ignored(logits, features, batch)


@pytest.mark.usefixtures("_late_interval")
def test_the_right_order_is_not_complained_about() -> None:
    for width, classes, largest in [(10, 10, 9), (48, 7, 6), (5, 6, 4)]:  # the sixth class may be absent by chance
        loss_fn = TALLoss()
        for _ in range(8):
            logits, features = torch.randn(3, classes, requires_grad=True), torch.rand(3, width, requires_grad=True)
            loss_fn(logits, features, torch.tensor([0, largest, 1]))


@pytest.mark.usefixtures("_late_interval")
def test_logits_without_a_gradient_are_noticed() -> None:
    logits, features, labels = torch.randn(4, 3, requires_grad=True), torch.rand(4, 5), torch.arange(4) % 3
    with pytest.warns(RuntimeWarning, match="the features have a gradient and the logits have none: .* look swapped"):
        TALLoss()(logits.detach(), features.requires_grad_(), labels)
    with torch.no_grad():
        TALLoss()(logits.detach(), features, labels)
    TALLoss()(logits.detach(), features.detach(), labels)
    TALLoss().loss_and_gradient(logits.detach(), features, labels)


@pytest.mark.usefixtures("_late_interval")
def test_the_look_at_the_order_leaves_a_compiled_step_one_graph() -> None:
    loss_fn = TALLoss(backend="reference")
    step = torch.compile(lambda *batch: loss_fn(*batch), fullgraph=True, backend="eager")
    step(torch.rand(8, 40), torch.randn(8, 5), torch.arange(8) % 5)
