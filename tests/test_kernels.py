"""The Triton kernels one by one: each launch path against float64, and what the launchers promise.

Without a GPU they run in Triton's interpreter; on a GPU they run compiled. What the kernels do
together, behind ``TALLoss`` and ``FeatureQueue``, is in test_loss.py and test_queue.py (backend ``triton``).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from tal_fast import TALLoss, kernels
from tal_fast.loss import reference
from tests.helpers.loss_cases import (
    CASES,
    exact,
    golden,
    options,
    random_batch,
    random_queue,
    reference_loss,
    relative,
    trace,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
USABLE, WHY = kernels.is_available(DEVICE)
if not USABLE:
    pytest.skip(WHY, allow_module_level=True)

import triton  # noqa: E402  (only where it is usable)
import triton.language as tl  # noqa: E402

from tal_fast.kernels import launch, loss, ops, ring, typicalness  # noqa: E402

pytestmark = pytest.mark.usefixtures("poison")


def gpu_too(test: Any) -> Any:
    """Part of ``pytest -m gpu``: the tests that tell most for the few seconds that compiling their kernels takes."""
    return pytest.mark.gpu(test) if DEVICE.type == "cuda" else test


TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
OPTIONS: dict[str, Any] = {
    "variant": "paper",
    "t_min": 10.0,
    "t_max": 100.0,
    "t_wrong": 20.0,
    "confidence_threshold": 0.0,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "warmup": False,
    "need_grad": True,
}
every_variant = pytest.mark.parametrize("variant", ["paper", "released"])


def new_ticket() -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=DEVICE)


def on_device(*tensors: Tensor) -> list[Tensor]:
    """On the device, strides kept: ``.to`` keeps only those of dense tensors."""
    if DEVICE.type == "cpu":
        return list(tensors)
    moved = []
    for t in tensors:
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        memory = t.as_strided((span,), (1,)).to(DEVICE) if span else t.to(DEVICE).flatten()
        moved.append(memory.as_strided(t.shape, t.stride()))
    return moved


class Result:
    """What ``loss_forward`` gave, on the CPU."""

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        self.loss, self.grad, stats, flags = (t.cpu() for t in outputs)
        self.typicalness, self.weight, self.temperature = stats
        self.right, self.accepted = flags


def run_loss(
    logits: Tensor, labels: Tensor, distance: Tensor, batch: Tensor | None = None, ticket: Tensor | None = None,
    **changes: Any,
) -> Result:  # fmt: skip
    """The loss kernel after the batch's own summary, unless one is given."""
    given = {**OPTIONS, **changes}
    ticket = new_ticket() if ticket is None else ticket
    if batch is None:
        keep = {key: given[key] for key in ("confidence_threshold", "ignore_index")}
        batch = reference.batch_summary(logits, labels, distance, **keep)
    moved = on_device(logits, labels, distance, batch)
    result = Result(kernels.loss_forward(*moved, ticket, **given))
    assert ticket.item() == 0
    return result


def exact_options(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in changes.items() if k in ("variant", "label_smoothing", "t_wrong", "ignore_index")}


def check_loss(logits: Tensor, labels: Tensor, distance: Tensor, **changes: Any) -> Result:
    """Against float64 for the kernel's own typicalness: no farther from it than eager PyTorch, plus the tolerance."""
    got = run_loss(logits, labels, distance, **changes)
    known = {k: v for k, v in changes.items() if k != "need_grad"}
    leaf = logits.detach().clone().requires_grad_()
    eager, stats = reference_loss(leaf, labels, distance, **known)
    (eager_grad,) = torch.autograd.grad(eager, leaf)
    truth = exact(logits, labels, got.typicalness, **exact_options(**changes))
    eager_truth = exact(logits, labels, stats.typicalness, **exact_options(**changes))
    tolerance = TOLERANCE.get(logits.dtype, 1e-12)
    assert got.loss.dtype == reference.compute_dtype(logits)
    assert relative(got.loss, truth[0]) <= relative(eager, eager_truth[0]) + tolerance
    if changes.get("need_grad", True):
        # float16 would lose small gradients before a scaler multiplies them
        assert got.grad.dtype == (torch.float32 if logits.dtype == torch.float16 else logits.dtype)
        assert got.grad.shape == logits.shape
        assert relative(got.grad, truth[1]) <= relative(eager_grad, eager_truth[1]) + tolerance
    else:
        assert got.grad.numel() == 0
    torch.testing.assert_close(got.typicalness, stats.typicalness, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.weight, stats.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.temperature, stats.temperature, rtol=1e-4, atol=1e-3)
    assert torch.equal(got.right, stats.correct)
    assert torch.equal(got.accepted, stats.accepted)
    return got


# ---- Loss: each launch path -----------------------------------------------------------------------------------------

PATHS = ["one block", "one block, recomputed", "packed in chunks of 32", "blocks of 64"]


@pytest.fixture(params=PATHS, ids=str)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every path of ``loss_forward`` at widths that a test can afford."""
    name = request.param

    def config(classes: int, dtype: torch.dtype, target: launch.Target, contiguous: bool) -> loss.LossConfig:
        warps = 4 // (target.warp_size // 32)
        if name.startswith("one block"):
            whole = max(1, 1 << (classes - 1).bit_length())
            return loss.LossConfig("one block", whole, warps, name.endswith("recomputed"))
        if name.startswith("packed") and dtype.itemsize == 2 and contiguous:
            return loss.LossConfig("packed", 32, warps)
        return loss.LossConfig("blocks", 64, warps)

    monkeypatch.setattr(loss, "loss_config", config)
    return request.param


@pytest.fixture(params=[1, 3, 64])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So few programs that each has several rows, and more than there are rows."""
    monkeypatch.setattr(loss, "programs_of", lambda rows, num_warps, target: request.param)
    return request.param


@every_variant
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 63, 64, 65, 130])
@pytest.mark.usefixtures("path")
def test_every_path_is_within_the_bound(classes: int, dtype: torch.dtype, variant: str) -> None:
    logits, _, labels = random_batch(7, classes)
    check_loss(logits.to(dtype), labels, torch.rand(7), variant=variant)


@every_variant
@pytest.mark.parametrize(
    "changes",
    [
        {"label_smoothing": 0.1},
        {"label_smoothing": 1.0},
        {"t_wrong": None},
        {"warmup": True},
        {"warmup": True, "t_wrong": None},
        {"need_grad": False, "label_smoothing": 0.2},
        {"confidence_threshold": 0.3},
        {"t_min": 2.0, "t_max": 20.0, "t_wrong": 3.5, "ignore_index": 4},
    ],
    ids=str,
)
@pytest.mark.usefixtures("path")
def test_every_option_on_every_path(changes: dict[str, Any], variant: str) -> None:
    logits, _, labels = random_batch(9, 70)
    labels[3], labels[8] = changes.get("ignore_index", -100), 69
    distance = torch.rand(9)
    distance[5] = torch.inf  # a row without statistics
    if "t_min" in changes:  # support.exact takes temperatures of its own
        got = run_loss(logits, labels, distance, variant=variant, **changes)
        leaf = logits.double().requires_grad_()
        want, stats = reference_loss(leaf, labels, distance.double(), variant=variant, **changes)
        (grad,) = torch.autograd.grad(want, leaf)
        assert relative(got.loss, want) <= 1e-5
        assert relative(got.grad, grad) <= 1e-4
        torch.testing.assert_close(got.temperature.double(), stats.temperature, rtol=1e-5, atol=0)
        return
    check_loss(logits, labels, distance, variant=variant, **changes)


@every_variant
@pytest.mark.usefixtures("path", "programs")
def test_rows_are_shared_among_programs(variant: str) -> None:
    logits, _, labels = random_batch(10, 33)
    check_loss(logits, labels, torch.rand(10), variant=variant)


@gpu_too
@every_variant
def test_more_programs_than_partial_sums_added_at_a_time(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "programs_of", lambda rows, num_warps, target: rows)
    logits, _, labels = random_batch(260, 3)
    check_loss(logits, labels, torch.rand(260), variant=variant)


@gpu_too
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("classes", [1003, 8192, 16384, 21841])
def test_bounds_at_the_launchers_own_configuration(classes: int, dtype: torch.dtype) -> None:
    # Either side of each change of path: one block, recomputed (half precision), blocks.
    logits, _, labels = random_batch(2, classes)
    labels[0] = classes - 1
    check_loss(logits.to(dtype), labels, torch.rand(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.usefixtures("path")
def test_confident_rows(smoothing: float) -> None:
    """p > 0.999: the label's gradient is the sum of the others, not what p - 1 leaves of it."""
    logits, _, labels = random_batch(6, 70)
    logits[torch.arange(6), labels] += 25
    assert (logits.softmax(1).amax(1) > 0.999).all()
    distance = torch.linspace(0, 1, 6)
    got = check_loss(logits, labels, distance, label_smoothing=smoothing, t_wrong=None)
    truth = exact(logits, labels, got.typicalness, label_smoothing=smoothing, t_wrong=None)[1]
    at_label = torch.arange(6), labels
    torch.testing.assert_close(got.grad[at_label].double(), truth[at_label], rtol=2e-4, atol=1e-14)


@gpu_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("path")
def test_ties_go_to_the_first_class(dtype: torch.dtype) -> None:
    logits = torch.randn(7, 150).clamp(max=1).to(dtype)
    logits[:, [7, 63, 64, 149]] = 2.5
    labels = torch.tensor([7, 63, 64, 149, 7, 0, -100])
    got = check_loss(logits, labels, torch.rand(7))
    assert got.right.tolist() == [True, False, False, False, True, False, False]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("at", ["label", "before", "after"])
@every_variant
@pytest.mark.usefixtures("path")
def test_logits_that_are_not_finite(variant: str, at: str, value: float) -> None:
    logits, labels = torch.randn(5, 140), torch.full((5,), 70)
    logits[:, 70] = 6
    logits[2, {"label": 70, "before": 3, "after": 139}[at]] = value
    got = run_loss(logits, labels, torch.rand(5), variant=variant, confidence_threshold=-1.0)
    good = torch.arange(5) != 2
    assert not got.loss.isfinite()
    assert got.accepted.tolist() == good.tolist()
    assert got.right[good].all()
    assert got.grad[good].isfinite().all()  # a bad row does not spread
    assert not got.grad[2].isfinite().any()
    assert got.typicalness.isfinite().all()
    ignored = run_loss(
        logits, labels.where(good, torch.tensor(-100)), torch.rand(5), variant=variant, confidence_threshold=-1.0
    )
    assert ignored.loss.isfinite()
    assert (ignored.grad[2] == 0).all()
    assert not ignored.right[2]
    assert not ignored.accepted[2]
    assert ignored.weight[2] == 0
    assert ignored.typicalness[2] == 1
    assert ignored.temperature[2] == OPTIONS["t_min"]


@every_variant
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.usefixtures("path")
def test_no_valid_row(rows: int, variant: str) -> None:
    logits, labels = torch.randn(rows, 70), torch.full((rows,), -100)
    got = run_loss(logits, labels, torch.rand(rows), variant=variant)
    assert got.loss.item() == 0
    assert got.grad.shape == (rows, 70)
    assert (got.grad == 0).all()
    assert (got.weight == 0).all()


@every_variant
@pytest.mark.usefixtures("path")
def test_zero_logits(variant: str) -> None:
    check_loss(torch.zeros(4, 70), torch.tensor([0, 1, 69, 0]), torch.rand(4), variant=variant)


@pytest.mark.usefixtures("path")
def test_logits_and_labels_of_any_strides() -> None:
    logits, _, labels = random_batch(6, 70)
    distance = torch.rand(6)
    want = run_loss(logits, labels, distance)
    spaced = torch.randn(6, 211)[:, ::3][:, :70].copy_(logits)
    for other in (logits.t().contiguous().t(), spaced):
        got = run_loss(other, labels.repeat_interleave(3)[::3], distance)
        assert torch.equal(got.loss, want.loss)
        assert torch.equal(got.grad, want.grad)
    one = torch.randn(1, 70)
    expanded, copied = (run_loss(z, labels, distance) for z in (one.expand(6, 70), one.repeat(6, 1)))
    assert torch.equal(expanded.grad, copied.grad)
    flat = torch.randn(6, 1)
    expanded, copied = (run_loss(z, labels, distance) for z in (flat.expand(6, 70), flat.repeat(1, 70)))
    assert torch.equal(expanded.grad, copied.grad)


@gpu_too
@pytest.mark.parametrize("strides", [(1_300_000_000, 1), (1, 1_300_000_000)], ids=["rows", "classes"])
@pytest.mark.usefixtures("path")
def test_addresses_beyond_32_bits(strides: tuple[int, int], tmp_path: Path) -> None:
    rows, classes = 3, 4
    span = 1 + (rows - 1) * strides[0] + (classes - 1) * strides[1]
    if DEVICE.type == "cuda":
        memory = torch.zeros(span, dtype=torch.float16, device=DEVICE)
    else:  # a file with holes: gigabytes of address, kilobytes of disk
        memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=span, dtype=torch.float16)
    far = memory.as_strided((rows, classes), strides)
    far.copy_(torch.randn(rows, classes))
    near = far.contiguous()
    labels, distance = torch.tensor([0, 3, 1], device=DEVICE), torch.rand(3, device=DEVICE)
    batch = reference.batch_summary(near, labels, distance)
    results = [kernels.loss_forward(z, labels, distance, batch.clone(), new_ticket(), **OPTIONS) for z in (far, near)]
    assert torch.equal(results[0][1], results[1][1])
    sums = []
    for z in (far, near):
        sums.append(batch.clone())
        kernels.batch_sums(z, labels, distance, sums[-1], new_ticket(), confidence_threshold=0.0, ignore_index=-100)
    assert torch.equal(*sums)


@every_variant
@pytest.mark.usefixtures("path")
def test_a_part_of_a_larger_batch(variant: str) -> None:
    """As over ranks: minimum and maximum of all, sums divided by the number of parts; n_valid need not be whole."""
    logits, _, labels = random_batch(11, 70)
    labels[0] = -100
    distance = torch.rand(11)
    whole = reference.batch_summary(logits, labels, distance)
    whole[2:] /= 2
    total, grads = 0.0, []
    for part in (slice(0, 4), slice(4, 11)):
        got = run_loss(logits[part], labels[part], distance[part], whole, variant=variant)
        want, _ = reference_loss(logits[part], labels[part], distance[part], variant=variant, summary=whole)
        assert relative(got.loss, want) <= 1e-5
        total += float(got.loss) / 2
        grads.append(got.grad / 2)
    together = run_loss(logits, labels, distance, variant=variant)
    assert total == pytest.approx(float(together.loss), rel=1e-5)
    assert relative(torch.cat(grads), together.grad) <= 1e-5


@pytest.mark.usefixtures("path")
def test_a_label_out_of_range_reads_nothing_outside() -> None:
    logits, labels, distance = torch.randn(3, 70), torch.tensor([70, -1, 10**15]), torch.rand(3)
    batch = torch.tensor([0, 1, 3, 0, 3, 0], dtype=torch.float64)
    got = run_loss(logits, labels, distance, batch)
    assert not got.right.any()
    assert not got.accepted.any()


@gpu_too
@every_variant
@pytest.mark.usefixtures("path")
def test_the_same_bits_every_time(variant: str) -> None:
    rows = 12 if DEVICE.type == "cpu" else 500
    logits, _, labels = random_batch(rows, 70)
    distance, ticket = torch.rand(rows), new_ticket()
    first = run_loss(logits, labels, distance, ticket=ticket, variant=variant)
    for _ in range(2 if DEVICE.type == "cpu" else 50):
        again = run_loss(logits, labels, distance, ticket=ticket, variant=variant)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.grad, first.grad)


# ---- Sums of a batch ------------------------------------------------------------------------------------------------


@gpu_too
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(0, 5), (1, 1), (33, 10), (5, 1003), (3, 2500), (260, 2)])
@pytest.mark.usefixtures("programs")
def test_batch_sums(rows: int, classes: int, dtype: torch.dtype) -> None:
    logits, labels = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
    labels = torch.where(torch.rand(rows) < 0.6, logits.float().argmax(1), labels) if rows else labels
    distance = torch.rand(rows)
    if rows > 30:
        labels[4] = labels[17] = -100
        logits[4] = torch.nan
        logits[6, int(labels[6])] = torch.inf
        distance[9], distance[17], distance[20] = torch.inf, torch.nan, torch.nan
    want = reference.batch_summary(logits, labels, distance, confidence_threshold=0.1)
    batch, ticket = want.clone(), new_ticket()
    batch[3:] = torch.nan
    moved = on_device(logits, labels, distance, batch)
    kernels.batch_sums(*moved, ticket, confidence_threshold=0.1, ignore_index=-100)
    assert ticket.item() == 0
    got = moved[3].cpu()
    assert torch.equal(got[:5], want[:5])
    torch.testing.assert_close(got[5], want[5], rtol=1e-12, atol=0)


@gpu_too
def test_sums_of_more_programs_than_are_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "programs_of", lambda rows, num_warps, target: 300)
    logits, labels, distance = torch.randn(300, 2), torch.randint(2, (300,)), torch.rand(300)
    want = reference.batch_summary(logits, labels, distance)
    batch = want.clone()
    batch[3:] = torch.nan
    moved = on_device(logits, labels, distance, batch)
    kernels.batch_sums(*moved, new_ticket(), confidence_threshold=0.0, ignore_index=-100)
    torch.testing.assert_close(moved[3].cpu(), want, rtol=1e-12, atol=0)
    check_loss(logits, labels, distance)


# ---- Statistics and distance ----------------------------------------------------------------------------------------


def run_statistics(
    features: Tensor, labels: Tensor | None, queue: tuple[Tensor, Tensor], length: int | None = None,
    ignore_index: int = -100,
) -> tuple[Tensor, ...]:  # fmt: skip
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    ticket = new_ticket()
    cursor = torch.tensor([0, queue[0].numel() if length is None else length], device=DEVICE)
    features, labels, *rings = on_device(features, labels, *queue)
    got = kernels.statistics_distance(features, labels, *rings, cursor, ticket, ignore_index)
    assert ticket.item() == 0
    return tuple(t.cpu() for t in got)


@pytest.fixture(params=[1, 3, 7])
def shares(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the queue, over programs."""
    monkeypatch.setattr(typicalness, "shares_of", lambda rows, capacity, target: request.param)
    return request.param


@gpu_too
@pytest.mark.parametrize("queue_dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("width", [2, 3, 64, 65, 2047])
def test_statistics_are_float64s(width: int, dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    features = (torch.rand(18, width) * torch.logspace(-3, 3, 18)[:, None]).to(dtype)
    features[3] += 100  # std far below the mean
    features[5] = 0.3  # no spread at all
    features[7, 0] = -200.0  # the kernel's own shift is an outlier
    wide = features.double()
    queue_mean, queue_std = random_queue(300)
    queue = queue_mean.to(queue_dtype), queue_std.to(queue_dtype)
    mean, std, distance, _ = run_statistics(features, None, queue)
    assert mean.dtype == std.dtype == distance.dtype == queue_dtype
    ulps = 4 * torch.finfo(queue_dtype).eps
    truth = wide.mean(1), wide.std(1)
    # In float64 the sums' own rounding grows with the width; the worst is the outlier's row.
    slack = 0 if queue_dtype == torch.float32 else 1e-12
    torch.testing.assert_close(mean.double(), truth[0], rtol=ulps + slack, atol=1e-14)
    torch.testing.assert_close(
        std.double(), truth[1], rtol=ulps + slack, atol=1e-9 if queue_dtype.itemsize == 4 else 1e-14
    )
    want = reference.nearest_distance(mean, std, *queue)
    torch.testing.assert_close(distance, want, rtol=8 * torch.finfo(queue_dtype).eps, atol=0)


@gpu_too
@pytest.mark.parametrize("entries", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300])
@pytest.mark.usefixtures("shares")
def test_distance_and_summary_for_any_split(rows: int, entries: int) -> None:
    if rows == 300 and entries == 1000 and DEVICE.type == "cpu":
        entries = 200  # the interpreter takes seconds
    features, labels = torch.rand(rows, 5), torch.randint(10, (rows,))
    labels[1::4] = -100
    features[2::7, 1] = torch.nan
    features[4::9, 0] = torch.inf
    queue = random_queue(entries + 5)
    for ring_part in queue:
        ring_part[entries:] = torch.nan  # slots beyond the length are not part of the queue
    mean, std, distance, batch = run_statistics(features, labels, queue, entries)
    want = reference.nearest_distance(mean, std, queue[0][:entries], queue[1][:entries])
    finite = features.isfinite().all(1)
    assert not distance[~finite].isfinite().any()
    torch.testing.assert_close(distance[finite], want[finite], rtol=1e-6, atol=0)
    measured = (distance.isfinite() & (labels != -100)).nonzero().flatten()
    d = distance[measured].double()
    low, high = (float(d.min()), float(d.max())) if len(d) else (float("inf"), float("-inf"))
    assert batch.dtype == torch.float64
    assert batch.tolist() == [low, high, int((labels != -100).sum()), 0, 0, 0]


@gpu_too
def test_distance_does_not_depend_on_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    features, queue = torch.rand(20, 9), random_queue(1500)
    results = []
    for split in (1, 2, 5, 12, 40):
        monkeypatch.setattr(typicalness, "shares_of", lambda rows, capacity, target, split=split: split)
        results.append(run_statistics(features, None, queue)[2])
    assert all(torch.equal(r, results[0]) for r in results)


@gpu_too
def test_features_and_labels_of_any_strides() -> None:
    features, labels, queue = torch.rand(19, 70), torch.randint(-1, 3, (19,)), random_queue(100)
    want = run_statistics(features, labels, queue, ignore_index=-1)
    spaced = torch.rand(38, 140)[::2, ::2].copy_(features)
    for other in (features.t().contiguous().t(), spaced):
        got = run_statistics(other, labels.repeat_interleave(2)[::2], queue, ignore_index=-1)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    expanded = run_statistics(features[:1].expand(19, 70), labels, queue)
    assert (expanded[2] == want[2][0]).all()


@gpu_too
def test_golden_distances() -> None:
    for case in CASES:
        g = golden(case)
        if not g["queue_mean"].numel():
            continue
        *_, distance, _ = run_statistics(
            g["features"].double(), g["labels"], (g["queue_mean"].double(), g["queue_std"].double())
        )
        torch.testing.assert_close(distance, g["distance"].double(), rtol=1e-7, atol=1e-12)


@gpu_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("shares")
def test_nearest(dtype: torch.dtype) -> None:
    queue = tuple(q.to(dtype) for q in random_queue(400))
    m, s = (q.to(dtype) for q in random_queue(21))
    rings = on_device(*queue)
    for length in (0, 1, 333, 400):
        cursor = torch.tensor([length % 400, length], device=DEVICE)
        got = kernels.nearest(*rings, cursor, *on_device(m.repeat_interleave(2)[::2], s)).cpu()
        want = reference.nearest_distance(m, s, queue[0][:length], queue[1][:length])
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(dtype).eps, atol=0)


# ---- Push -----------------------------------------------------------------------------------------------------------


@gpu_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("capacity", [1, 13, 1500])
def test_push_is_a_list_with_the_oldest_dropped(capacity: int, dtype: torch.dtype) -> None:
    rings = [torch.full((capacity,), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    cursor = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    expected: list[tuple[float, float]] = []
    pushed = 0
    for rows in (0, 1, 12, 13, 14, 400, ring.ROWS, ring.ROWS + 1, 2 * ring.ROWS + 453, 5):
        mean, std = torch.randn(rows, dtype=dtype), torch.rand(rows, dtype=dtype)
        accepted: Tensor | None = torch.rand(rows) < 0.8
        if rows > 12:
            mean[3], std[7], mean[11] = torch.nan, torch.inf, -torch.inf
        if rows == 13:
            accepted = torch.zeros(rows, dtype=torch.bool)
        if rows == 400:
            accepted = None
        keep = mean.isfinite() & std.isfinite() & (True if accepted is None else accepted)
        flags = None if accepted is None else on_device(accepted.repeat_interleave(2)[::2])[0]
        kernels.push(*rings, cursor, *on_device(mean, std), flags)
        pushed += int(keep.sum())
        expected = (expected + list(zip(mean[keep].tolist(), std[keep].tolist(), strict=True)))[-capacity:]
        head, length = cursor.tolist()
        assert (head, length) == (pushed % capacity, min(pushed, capacity))
        slots = (torch.arange(length) + head - length) % capacity
        assert list(zip(*(r.cpu()[slots].tolist() for r in rings), strict=True)) == expected
    assert pushed > 2 * capacity


# ---- Golden data ----------------------------------------------------------------------------------------------------


@gpu_too
@every_variant
@pytest.mark.parametrize("case", CASES)
def test_golden_loss_and_gradient(case: str, variant: str) -> None:
    g = golden(case)
    got = run_loss(
        g["logits"].double(),
        g["labels"],
        g["distance"].double(),
        **options(g, variant),
        warmup=bool(g["warmup"]) or not g["queue_mean"].numel(),
    )
    assert relative(got.loss, g[f"{variant}/loss"]) <= 1e-12
    assert relative(got.grad, g[f"{variant}/grad"]) <= 1e-7
    assert torch.equal(got.right, g["correct"])


@gpu_too
def test_golden_trace_in_float32() -> None:
    """40 steps, the queue wrapped several times: float32 keeps the same samples and stays close."""
    t = trace()
    loss_fn = TALLoss("released", queue_size=int(t["capacity"]), backend="triton").to(DEVICE)
    for step in range(len(t["logits"])):
        logits, features = (t[key][step].float().to(DEVICE) for key in ("logits", "features"))
        value = loss_fn(logits, features, t["labels"][step].to(DEVICE), warmup=step < int(t["warmup_steps"]))
        assert relative(value.cpu(), t["loss_released"][step]) <= 1e-3
        assert len(loss_fn.queue) == int(t["queue_len"][step])
    mean, std = loss_fn.queue.contents()
    torch.testing.assert_close(mean.cpu().double(), t["queue_mean"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std.cpu().double(), t["queue_std"], rtol=1e-6, atol=1e-6)


# ---- The last program ------------------------------------------------------------------------------------------------


@triton.jit
def _arrivals_kernel(ticket_ptr, last_ptr):
    last = typicalness.is_last(ticket_ptr, tl.num_programs(0))
    tl.store(last_ptr + tl.program_id(0), last)


@gpu_too
@pytest.mark.parametrize("count", [1, 2, 300])
def test_one_program_is_the_last(count: int) -> None:
    ticket = new_ticket()
    for _ in range(3):
        last = torch.zeros(count, dtype=torch.bool, device=DEVICE)
        _arrivals_kernel[(count,)](ticket, last)
        assert last.sum() == 1
        assert last[-1] or DEVICE.type == "cuda"  # the interpreter takes them in order
        assert ticket.item() == 0


# ---- What the launchers promise -------------------------------------------------------------------------------------


def test_no_number_that_a_user_chooses_is_compiled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Temperatures, thresholds and smoothing reach the kernel through memory: as arguments they would be rounded to
    float32, as constants each value would be compiled anew."""
    seen: list[launch.Launch] = []
    monkeypatch.setattr(launch.Launch, "run", lambda planned: seen.append(planned))
    logits, labels, distance, batch = on_device(
        torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), torch.rand(4), torch.ones(6, dtype=torch.float64)
    )
    for t_max, t_wrong, smoothing, threshold in ((100.0, 20.0, 0.1, 0.0), (33.3, 21.0, 0.2, 0.5)):
        changes = {"t_max": t_max, "t_wrong": t_wrong, "label_smoothing": smoothing, "confidence_threshold": threshold}
        loss.loss_forward(logits, labels, distance, batch, new_ticket(), **{**OPTIONS, **changes})
        loss.batch_sums(
            logits, labels, distance, batch, new_ticket(), confidence_threshold=threshold, ignore_index=-100
        )
    assert len(seen) == 4
    for one, other in ((seen[0], seen[2]), (seen[1], seen[3])):
        assert one.constants == other.constants
        assert not any(isinstance(v, float) for v in (*one.arguments.values(), *one.constants.values()))


@pytest.mark.parametrize(("variant", "expected"), [("paper", 3), ("released", 4)])
def test_launches_of_a_step_and_the_memory_it_takes(
    variant: Literal["paper", "released"], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Statistics and distance, loss and gradient, push, and for ``released`` the batch's sums; backward adds the one
    that looks at the upstream factor. Nothing of B x N is allocated, and of B x C the gradient alone."""
    rows, classes, entries = 40, 50, 3000
    launched: list[str] = []
    run = launch.Launch.run

    def counted(planned: launch.Launch) -> None:
        launched.append(planned.kernel.__name__)
        with _disable_current_modes():  # the interpreter copies arguments
            run(planned)

    class Allocations(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.sizes[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes() // out.element_size()
            return out

    loss_fn = TALLoss(variant, queue_size=entries, backend="triton").to(DEVICE)
    loss_fn.queue.push(*on_device(*random_queue(entries)))
    logits, features, labels = on_device(*random_batch(rows, classes, width=4))
    z = logits.requires_grad_() * 1.0
    loss_fn(z, features, labels)
    monkeypatch.setattr(launch.Launch, "run", counted)
    with Allocations() as seen:
        value = loss_fn(z, features, labels)
    assert len(launched) == expected
    own = [size for pointer, size in seen.sizes.items() if pointer != z.data_ptr()]
    assert sum(size >= rows * classes for size in own) == 1
    assert max(own) == rows * classes
    value.backward()
    # The interpreter's CPU looks at the factor without a launch.
    assert len(launched) == expected + (DEVICE.type == "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_scale(size: int, dtype: torch.dtype) -> None:
    for factor in (1.0, -2.5, 0.0):
        values = torch.randn(size).to(dtype)
        want = (values.double() * factor).to(dtype)
        (moved,) = on_device(values.clone())
        kernels.scale(moved, torch.tensor(factor, device=DEVICE))
        torch.testing.assert_close(moved.cpu(), want)


@pytest.mark.parametrize("need_grad", [True, False])
def test_operators_keep_to_their_schemas(need_grad: bool) -> None:
    """Mutated arguments, fake shapes and dtypes, and behaviour under AOT dispatch, as torch.compile relies on them."""
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    logits, features, labels = on_device(*random_batch(5, 7))
    rings = on_device(*random_queue(6))
    cursor = torch.tensor([3, 6], device=DEVICE)
    statistics = features, labels, *rings, cursor, new_ticket(), -100
    torch.library.opcheck(ops.statistics_distance, statistics, test_utils=tests)
    mean, std, distance, batch = ops.statistics_distance(*statistics)
    torch.library.opcheck(ops.batch_sums, (logits, labels, distance, batch, new_ticket(), 0.0, -100), test_utils=tests)
    for dtype in (torch.float32, torch.float16, torch.float64):
        torch.library.opcheck(
            ops.loss_forward,
            (logits.to(dtype), labels, distance, batch, new_ticket()),
            {**OPTIONS, "need_grad": need_grad},
            test_utils=tests,
        )
    accepted = torch.rand(5, device=DEVICE) < 0.5
    for kept in (accepted, None):
        torch.library.opcheck(ops.push_, (*rings, cursor, mean, std, kept), test_utils=tests)
    torch.library.opcheck(ops.nearest, (*rings, cursor, mean, std), test_utils=tests)


def test_availability_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.is_available(torch.device("cuda")) == (True, "")
    usable, why = kernels.is_available(torch.device("mps"))
    assert not usable
    assert "mps" in why
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    usable, why = kernels.is_available(torch.device("cpu"))
    assert not usable
    assert "TRITON_INTERPRET=1" in why


def test_the_package_is_imported_without_triton() -> None:
    code = """
import sys
import torch, tal_fast, tal_fast.kernels as kernels
assert "triton" not in sys.modules, "importing tal_fast imports triton"
sys.modules["triton"] = None
usable, why = kernels.is_available(torch.device("cuda"))
assert not usable and "triton cannot be imported" in why, why
try:
    tal_fast.TALLoss(backend="triton")(torch.randn(2, 3), torch.rand(2, 4), torch.tensor([0, 1]))
except ValueError as error:
    assert "triton cannot be imported" in str(error), error
else:
    raise AssertionError("backend='triton' ran without triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr


# ---- On a GPU only --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "dtype", "variant"),
    [
        *((c, d, "paper") for c in (10, 1000, 4096, 16384, 131072) for d in (torch.float32, torch.bfloat16)),
        *((c, torch.float16, "released") for c in (100, 8192, 21841)),
    ],
    ids=str,
)
def test_bounds_at_sizes_that_are_trained(classes: int, dtype: torch.dtype, variant: str) -> None:
    logits, _, labels = random_batch(257 if classes < 10_000 else 33, classes)
    check_loss(logits.to(dtype), labels, torch.rand(len(labels)), variant=variant, label_smoothing=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "entries"), [(128, 512, 30_000), (256, 2048, 880_880), (33, 129, 20_001)])
def test_distance_at_sizes_that_are_trained(rows: int, width: int, entries: int) -> None:
    features, queue = torch.rand(rows, width), random_queue(entries)
    mean, std, distance, _ = run_statistics(features, None, queue)
    torch.testing.assert_close(mean.double(), features.double().mean(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(std.double(), features.double().std(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(distance, reference.nearest_distance(mean, std, *queue), rtol=1e-6, atol=0)
    for _ in range(20):
        assert torch.equal(run_statistics(features, None, queue)[2], distance)


@pytest.mark.gpu
@every_variant
def test_a_step_in_a_cuda_graph(variant: Literal["paper", "released"]) -> None:
    """Statistics, loss, gradient and push, captured once and replayed on new data: nothing waits for the host."""
    steps = [[t.to(DEVICE) for t in random_batch(64, 100)] for _ in range(6)]
    eager = TALLoss(variant, queue_size=150, backend="triton").to(DEVICE)
    graphed = TALLoss(variant, queue_size=150, backend="triton").to(DEVICE)
    logits, features, labels = (t.clone() for t in steps[0])
    logits.requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        value = graphed(logits, features, labels)
        return value.detach(), torch.autograd.grad(value, logits)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graphed.queue.reset()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, grad = step()
    graphed.queue.reset()
    for z, f, y in steps:
        with torch.no_grad():
            logits.copy_(z)
            features.copy_(f)
            labels.copy_(y)
        graph.replay()
        leaf = z.clone().requires_grad_()
        want = eager(leaf, f, y)
        assert torch.equal(value, want.detach())
        assert torch.equal(grad, torch.autograd.grad(want, leaf)[0])
        assert torch.equal(graphed.queue.ring.cursor, eager.queue.ring.cursor)
        assert torch.equal(graphed.queue.ring.mean, eager.queue.ring.mean)


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    logits, features, labels = (t.to(DEVICE) for t in random_batch(32, 10))
    variants: tuple[Literal["paper", "released"], ...] = ("paper", "released")
    for variant in variants:
        loss_fn = TALLoss(variant, queue_size=50, backend="triton").to(DEVICE)
        loss_fn(logits.requires_grad_(), features, labels).backward()  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss_fn(logits, features, labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
