"""Statistics and distance kernels against float64 PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.helpers.kernels import AVAILABLE, DEVICE, NAN_WARNINGS, REASON, gpu_too, new_tickets, on_device
from tests.helpers.loss_cases import CASES, golden, random_queue

if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

import triton
import triton.language as tl

from tal_fast import kernels
from tal_fast.kernels import distance, launch
from tal_fast.loss import reference

pytestmark = [pytest.mark.usefixtures("poison"), *NAN_WARNINGS]


def run_statistics(
    features: Tensor, labels: Tensor | None, queue: tuple[Tensor, Tensor], length: int | None = None,
    ignore_index: int = -100, class_weight: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Outputs of the statistics kernel on the CPU."""
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    cursor = torch.tensor([0, queue[0].numel() if length is None else length], device=DEVICE)
    features, labels, *queue_on_device = on_device(features, labels, *queue)
    *outputs, tickets = kernels.statistics_distance(
        features, labels, *queue_on_device, cursor, class_weight, ignore_index
    )
    assert not tickets.any()
    return tuple(t.cpu() for t in outputs)


@gpu_too
@pytest.mark.parametrize(
    ("dtype", "queue_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float64, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [2, 3, 64, 65, 2047])
def test_statistics_are_those_of_float64(width: int, dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    features = (torch.rand(18, width) * torch.logspace(-3, 3, 18)[:, None]).to(dtype)
    features[3] += 100  # standard deviation far below the mean
    features[5] = 0.3  # constant
    features[7, 0] = -200.0  # the first feature, by which the kernel shifts, is an outlier
    wide = features.double()
    queue_mean, queue_std = random_queue(300)
    queue = queue_mean.to(queue_dtype), queue_std.to(queue_dtype)
    mean, std, nearest, _ = run_statistics(features, None, queue)
    assert mean.dtype == std.dtype == nearest.dtype == queue_dtype
    ulps = 4 * torch.finfo(queue_dtype).eps
    # In float64 the rounding of the sums grows with the width; the outlier's row is the worst.
    slack = 0 if queue_dtype == torch.float32 else 1e-12
    torch.testing.assert_close(mean.double(), wide.mean(1), rtol=ulps + slack, atol=1e-14)
    std_atol = 1e-9 if queue_dtype == torch.float32 else 1e-14
    torch.testing.assert_close(std.double(), wide.std(1), rtol=ulps + slack, atol=std_atol)
    expected = reference.nearest_distance(mean, std, *queue)
    torch.testing.assert_close(nearest, expected, rtol=8 * torch.finfo(queue_dtype).eps, atol=0)


# Rows around the query block of 16 and beyond the reduction's 256; entries around the tile of 64 and 8 of them; more
# splits than tiles, fewer, and as many.
SPLITS = [
    *((17, entries, splits) for entries in (0, 1, 63, 64, 65, 700) for splits in (1, 3)),
    *((rows, entries, 3) for rows in (0, 1, 16) for entries in (0, 65)),
    (300, 65, 3),
]


@gpu_too
@pytest.mark.parametrize(("rows", "entries", "splits"), SPLITS)
def test_distance_and_summary_for_any_split(
    rows: int, entries: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distance, "num_splits_for", lambda blocks, capacity, target: splits)
    features, labels = torch.rand(rows, 5), torch.randint(10, (rows,))
    labels[1::4] = -100
    features[2::7, 1] = torch.nan
    features[4::9, 0] = torch.inf
    queue = random_queue(entries + 5)
    if rows and entries:  # the last entry is the nearest of the first row
        queue[0][entries - 1], queue[1][entries - 1] = features[0].mean() + 1e-5, features[0].std()
    for values in queue:
        values[entries:] = torch.nan  # slots past the length are not part of the queue
    mean, std, nearest, batch = run_statistics(features, labels, queue, entries)
    expected = reference.nearest_distance(mean, std, queue[0][:entries], queue[1][:entries])
    finite = features.isfinite().all(1)
    assert not nearest[~finite].isfinite().any()
    torch.testing.assert_close(nearest[finite], expected[finite], rtol=1e-6, atol=0)
    measured = nearest[nearest.isfinite() & (labels != -100)].double()
    low, high = (float(measured.min()), float(measured.max())) if len(measured) else (float("inf"), float("-inf"))
    assert batch.dtype == torch.float64
    count = int((labels != -100).sum())
    assert batch.tolist() == [low, high, count, 0, 0, 0, count]


@gpu_too
def test_label_out_of_range_reads_no_class_weight() -> None:
    memory = torch.full((5,), torch.nan)
    memory[1:4] = torch.tensor([0.5, 1.0, 2.0])
    labels = torch.tensor([0, -1, 3, 2])
    batch = run_statistics(torch.rand(4, 6), labels, random_queue(10), class_weight=memory.to(DEVICE)[1:4])[3]
    assert batch[6] == 2.5


def test_sum_of_the_class_weights() -> None:
    features, labels, weights = torch.rand(300, 5), torch.randint(4, (300,)), torch.tensor([0.5, 0.0, 2.0, 7.0])
    labels[::3] = -100
    batch = run_statistics(features, labels, random_queue(10), class_weight=weights.to(DEVICE))[3]
    assert batch[6] == weights[labels[labels != -100]].double().sum()


@gpu_too
def test_distance_does_not_depend_on_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    features, queue = torch.rand(20, 9), random_queue(700)
    results = []
    for splits in (1, 2, 5, 12):
        monkeypatch.setattr(distance, "num_splits_for", lambda blocks, capacity, target, splits=splits: splits)
        launch.forget_plans()
        results.append(run_statistics(features, None, queue)[2])
    assert all(torch.equal(r, results[0]) for r in results)


@gpu_too
def test_features_and_labels_of_any_strides() -> None:
    features, labels, queue = torch.rand(19, 70), torch.randint(-1, 3, (19,)), random_queue(100)
    expected = run_statistics(features, labels, queue, ignore_index=-1)
    spaced = torch.rand(38, 140)[::2, ::2].copy_(features)
    for other in (features.t().contiguous().t(), spaced):
        outputs = run_statistics(other, labels.repeat_interleave(2)[::2], queue, ignore_index=-1)
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    expanded = run_statistics(features[:1].expand(19, 70), labels, queue)
    assert (expanded[2] == expected[2][0]).all()


@gpu_too
def test_distances_equal_the_golden_ones() -> None:
    for case in CASES:
        g = golden(case)
        if not g["queue_mean"].numel():
            continue
        queue = g["queue_mean"].double(), g["queue_std"].double()
        nearest = run_statistics(g["features"].double(), g["labels"], queue)[2]
        torch.testing.assert_close(nearest, g["distance"].double(), rtol=1e-7, atol=1e-12)


@gpu_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("splits", [1, 3, 7])
def test_nearest_equals_brute_force(splits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "num_splits_for", lambda blocks, capacity, target: splits)
    queue = tuple(q.to(dtype) for q in random_queue(400))
    m, s = (q.to(dtype) for q in random_queue(21))
    queue_on_device = on_device(*queue)
    for length in (0, 1, 333, 400):
        cursor = torch.tensor([length % 400, length], device=DEVICE)
        nearest = kernels.nearest(*queue_on_device, cursor, *on_device(m.repeat_interleave(2)[::2], s)).cpu()
        expected = reference.nearest_distance(m, s, queue[0][:length], queue[1][:length])
        torch.testing.assert_close(nearest, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)


@triton.jit
def _arrivals_kernel(ticket_ptr, last_ptr):
    last = distance.is_last_program(ticket_ptr, tl.num_programs(0))
    tl.store(last_ptr + tl.program_id(0), last)


@gpu_too
@pytest.mark.parametrize("count", [1, 2, 300])
def test_exactly_one_program_is_the_last(count: int) -> None:
    ticket = new_tickets()
    for _ in range(3):
        last = torch.zeros(count, dtype=torch.bool, device=DEVICE)
        _arrivals_kernel[(count,)](ticket, last)
        assert last.sum() == 1
        assert last[-1] or DEVICE.type == "cuda"  # the interpreter runs them in order
        assert not ticket.any()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width", "entries"), [(128, 512, 30_000), (256, 2048, 880_880), (33, 129, 20_001)])
def test_distance_at_training_sizes(rows: int, width: int, entries: int) -> None:
    features, queue = torch.rand(rows, width), random_queue(entries)
    mean, std, nearest, _ = run_statistics(features, None, queue)
    torch.testing.assert_close(mean.double(), features.double().mean(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(std.double(), features.double().std(1), rtol=2e-7, atol=0)
    torch.testing.assert_close(nearest, reference.nearest_distance(mean, std, *queue), rtol=1e-6, atol=0)
    for _ in range(20):
        assert torch.equal(run_statistics(features, None, queue)[2], nearest)
