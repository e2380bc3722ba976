"""Loss kernels: each launch path against float64, the batch sums, and the scaling of a gradient.

What the kernels do behind ``TALLoss`` and ``FeatureQueue`` is tested in tests/loss (backend ``triton``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.backends import every_variant
from tests.helpers.kernels import (
    AVAILABLE,
    DEVICE,
    LOSS_OPTIONS,
    NAN_WARNINGS,
    REASON,
    gpu_too,
    new_tickets,
    on_device,
)
from tests.helpers.loss_cases import CASES, exact, golden, options, random_batch, reference_loss, relative

if not AVAILABLE:
    pytest.skip(REASON, allow_module_level=True)

import triton.language as tl

from tal_fast import kernels
from tal_fast.kernels import launch, layout, loss, sums
from tal_fast.kernels import rows as rows_module
from tal_fast.loss import reference
from tal_fast.loss.options import LossOptions

pytestmark = [pytest.mark.usefixtures("poison"), *NAN_WARNINGS]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
HALF_AND_SINGLE = [torch.float32, torch.float16, torch.bfloat16]
# Ways to read a row, at widths that the interpreter can afford, and the dtype of the logits that the tests give each.
PATHS = {
    "held": torch.float32,
    "held, edges": torch.bfloat16,
    "wide": torch.bfloat16,
    "wide, edges": torch.float32,
}


WEIGHTS = torch.linspace(0.0, 2.0, 70)
EXACT_OPTIONS = ("variant", "label_smoothing", "t_wrong", "ignore_index", "reduction", "class_weight")


class Result:
    """Outputs of ``loss_forward`` on the CPU."""

    def __init__(self, outputs: tuple[Tensor, ...]) -> None:
        self.loss, self.grad, stats, flags = (t.cpu() for t in outputs)
        self.typicalness, self.weight, self.temperature = stats
        self.correct, self.accepted = flags


def run_loss(
    logits: Tensor, labels: Tensor, distance: Tensor, summary: Tensor | None = None, tickets: Tensor | None = None,
    **changes: Any,
) -> Result:  # fmt: skip
    """Run the loss kernel, after the batch's own summary unless one is given."""
    own_threshold = LossOptions(variant=changes.get("variant", "paper")).confidence_threshold
    arguments = {**LOSS_OPTIONS, "confidence_threshold": own_threshold, **changes}
    tickets = new_tickets() if tickets is None else tickets
    if summary is None:
        summary_options = {key: arguments[key] for key in ("confidence_threshold", "ignore_index", "class_weight")}
        summary = reference.batch_summary(logits, labels, distance, **summary_options)
    if arguments["class_weight"] is not None:
        arguments["class_weight"] = arguments["class_weight"].to(DEVICE)
    result = Result(kernels.loss_forward(*on_device(logits, labels, distance, summary), tickets, **arguments))
    assert not tickets.any()
    return result


def check_loss(logits: Tensor, labels: Tensor, distance: Tensor, **changes: Any) -> Result:
    """Assert that loss and gradient are as near to float64 as eager PyTorch, plus the tolerance of the dtype.

    Float64 results are taken for the kernel's own typicalness; statistics are compared with the reference.
    """
    result = run_loss(logits, labels, distance, **changes)
    leaf = logits.detach().clone().requires_grad_()
    eager, stats = reference_loss(leaf, labels, distance, **{k: v for k, v in changes.items() if k != "need_grad"})
    (eager_grad,) = torch.autograd.grad(eager.sum(), leaf)
    exact_options = {k: changes[k] for k in EXACT_OPTIONS if k in changes}
    true_loss, true_grad = exact(logits, labels, result.typicalness, **exact_options)
    eager_true_loss, eager_true_grad = exact(logits, labels, stats.typicalness, **exact_options)
    tolerance = TOLERANCE[logits.dtype]
    assert result.loss.dtype == reference.compute_dtype(logits)
    assert relative(result.loss, true_loss) <= relative(eager, eager_true_loss) + tolerance
    if changes.get("need_grad", True):
        # float16 would lose small gradients before a gradient scaler multiplies them.
        assert result.grad.dtype == (torch.float32 if logits.dtype == torch.float16 else logits.dtype)
        assert result.grad.shape == logits.shape
        assert relative(result.grad, true_grad) <= relative(eager_grad, eager_true_grad) + tolerance
    else:
        assert result.grad.numel() == 0
    torch.testing.assert_close(result.typicalness, stats.typicalness, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.weight, stats.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.temperature, stats.temperature, rtol=1e-4, atol=1e-3)
    assert torch.equal(result.correct, stats.correct)
    assert torch.equal(result.accepted, stats.accepted)
    return result


def force_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the launcher hold rows in three chunks of 64 logits, or read them in chunks of 32; with "edges" in vectors
    of 4 or 8 that rows need not begin and end with, where rows are contiguous."""
    held = layout.LossConfig(2, 3, 64, True, 1, 4)
    wide = layout.LossConfig(1, 1, 32, False, 1, 4, unroll=2)
    monkeypatch.setattr(layout, "loss_config", lambda *_: held if name.startswith("held") else wide)
    vector_of = layout.vector_of

    def edges(
        classes: int, itemsize: int, stride: tuple[int, int], aligned: bool, grad_stride: int | None = None
    ) -> tuple[int, bool]:
        v = 8 if itemsize == 2 else 4
        if grad_stride not in (None, stride[0]) or stride[1] != 1 or classes < v:
            return vector_of(classes, itemsize, stride, aligned, grad_stride)
        return v, True

    if name.endswith("edges"):
        monkeypatch.setattr(layout, "vector_of", edges)


@pytest.fixture(params=PATHS)
def path_dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Force each path in turn; the value is the dtype of the logits to give it."""
    force_path(request.param, monkeypatch)
    return PATHS[request.param]


@every_variant
@pytest.mark.parametrize("classes", [1, 63, 64, 65, 130])  # around the chunks of 32 and 64
def test_every_path_is_within_the_error_bound(classes: int, path_dtype: torch.dtype, variant: str) -> None:
    logits, _, labels = random_batch(4, classes)
    check_loss(logits.to(path_dtype), labels, torch.rand(4), variant=variant)


@pytest.mark.parametrize(
    ("path", "dtype"),
    [
        ("held", torch.float64),
        ("held", torch.bfloat16),
        ("held, edges", torch.float16),
        ("wide", torch.float16),
        ("wide", torch.float64),
        ("wide, edges", torch.float64),
    ],
    ids=str,
)
def test_other_dtypes_are_within_the_error_bound(
    path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    force_path(path, monkeypatch)
    logits, _, labels = random_batch(5, 65)
    check_loss(logits.to(dtype), labels, torch.rand(5), variant="released")


@pytest.mark.parametrize(
    "changes",
    [
        {"label_smoothing": 0.1, "variant": "released"},
        {"label_smoothing": 1.0},
        {"t_wrong": None, "variant": "released"},
        {"warmup": True, "variant": "released"},
        {"warmup": True, "t_wrong": None},
        {"need_grad": False, "label_smoothing": 0.2},
        {"confidence_threshold": 0.3, "variant": "released"},
        {"reduction": "sum"},
        {"reduction": "none", "variant": "released"},
        {"class_weight": WEIGHTS, "reduction": "none"},
        {"class_weight": WEIGHTS, "label_smoothing": 0.1, "reduction": "mean"},
        {"class_weight": WEIGHTS, "label_smoothing": 1.0, "variant": "released"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_option_on_every_path(changes: dict[str, Any], path_dtype: torch.dtype) -> None:
    logits, _, labels = random_batch(5, 70)
    labels[3], labels[4] = -100, 69
    distance = torch.rand(5)
    distance[1] = torch.inf  # a row without statistics
    check_loss(logits.to(path_dtype), labels, distance, **changes)


@every_variant
def test_temperatures_and_ignore_index(path_dtype: torch.dtype, variant: str) -> None:
    changes = {"variant": variant, "t_min": 2.0, "t_max": 20.0, "t_wrong": 3.5, "ignore_index": 4}
    logits, _, labels = random_batch(5, 70)
    logits = logits.to(path_dtype)
    labels[3], labels[4] = 4, 69
    distance = torch.rand(5)
    result = run_loss(logits, labels, distance, **changes)
    leaf = logits.double().requires_grad_()
    expected, stats = reference_loss(leaf, labels, distance.double(), **changes)
    (grad,) = torch.autograd.grad(expected, leaf)
    assert relative(result.loss, expected.detach()) <= 1e-5
    assert relative(result.grad, grad) <= 10 * TOLERANCE[path_dtype]
    torch.testing.assert_close(result.temperature.double(), stats.temperature, rtol=1e-5, atol=0)


@pytest.mark.parametrize("programs", [2, 64])
def test_rows_are_shared_among_programs(
    programs: int, path_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer programs than rows, and more."""
    monkeypatch.setattr(layout, "num_programs_for", lambda turns, per_multiprocessor, target: programs)
    logits, _, labels = random_batch(5, 33)
    check_loss(logits.to(path_dtype), labels, torch.rand(5))


@gpu_too
@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("classes", [1003, 8192, 16384, 21841])
def test_error_bound_at_the_launch_configuration(classes: int, dtype: torch.dtype) -> None:
    """Widths on either side of each change of path: one block, recomputed and packed (half precision), blocks."""
    logits, _, labels = random_batch(2, classes)
    labels[0] = classes - 1
    check_loss(logits.to(dtype), labels, torch.rand(2))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_confident_rows_at_the_label(smoothing: float, path_dtype: torch.dtype) -> None:
    """The gradient is the sum of the other probabilities, which p - 1 would lose where p > 0.999."""
    logits, _, labels = random_batch(6, 70)
    logits[torch.arange(6), labels] += 25
    assert (logits.softmax(1).amax(1) > 0.999).all()
    logits = logits.to(path_dtype)
    result = check_loss(logits, labels, torch.linspace(0, 1, 6), label_smoothing=smoothing, t_wrong=None)
    _, truth = exact(logits, labels, result.typicalness, label_smoothing=smoothing, t_wrong=None)
    at_label = torch.arange(6), labels
    torch.testing.assert_close(
        result.grad[at_label].double(), truth[at_label], rtol=20 * TOLERANCE[path_dtype], atol=1e-14
    )


@gpu_too
def test_ties_go_to_the_first_class(path_dtype: torch.dtype) -> None:
    logits = torch.randn(7, 150).clamp(max=1).to(path_dtype)
    logits[:, [7, 63, 64, 149]] = 2.5
    labels = torch.tensor([7, 63, 64, 149, 7, 0, -100])
    result = check_loss(logits, labels, torch.rand(7))
    assert result.correct.tolist() == [True, False, False, False, True, False, False]


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("value", "variant"),
    [(torch.nan, "paper"), (torch.inf, "paper"), (-torch.inf, "paper"), (1e30, "paper"), (torch.nan, "released")],
)
def test_logits_that_are_not_finite(value: float, variant: str, path_dtype: torch.dtype) -> None:
    """At the label, before it and after it, in rows of their own; the rows around them stay finite.

    1e30 is finite, its square is not.
    """
    logits, labels = torch.randn(5, 140).to(path_dtype), torch.full((5,), 70)
    logits[:, 70] = 6
    bad, good = torch.tensor([1, 2, 3]), torch.tensor([0, 4])
    logits[bad, torch.tensor([70, 3, 139])] = value
    changes = {"variant": variant, "confidence_threshold": -1.0}
    result = run_loss(logits, labels, torch.rand(5), **changes)
    assert not result.loss.isfinite()
    assert result.accepted.tolist() == [True, False, False, False, True]
    assert result.correct[good].all()
    assert result.grad[good].isfinite().all()
    assert not result.grad[bad].isfinite().any()
    assert result.typicalness.isfinite().all()
    labels[bad] = -100
    ignored = run_loss(logits, labels, torch.rand(5), **changes)
    assert ignored.loss.isfinite()
    assert (ignored.grad[bad] == 0).all()
    assert not ignored.correct[bad].any()
    assert not ignored.accepted[bad].any()
    assert (ignored.weight[bad] == 0).all()
    assert (ignored.typicalness[bad] == 1).all()
    assert (ignored.temperature[bad] == LOSS_OPTIONS["t_min"]).all()


@every_variant
@pytest.mark.parametrize("rows", [0, 3])
def test_batch_without_valid_rows(rows: int, path_dtype: torch.dtype, variant: str) -> None:
    logits, labels = torch.randn(rows, 70).to(path_dtype), torch.full((rows,), -100)
    result = run_loss(logits, labels, torch.rand(rows), variant=variant)
    assert result.loss.item() == 0
    assert result.grad.shape == (rows, 70)
    assert (result.grad == 0).all()
    assert (result.weight == 0).all()


@every_variant
def test_zero_logits(path_dtype: torch.dtype, variant: str) -> None:
    check_loss(torch.zeros(4, 70).to(path_dtype), torch.tensor([0, 1, 69, 0]), torch.rand(4), variant=variant)


def test_logits_and_labels_of_any_strides(path_dtype: torch.dtype) -> None:
    logits, _, labels = random_batch(3, 70)
    distance = torch.rand(3)
    expected = run_loss(logits, labels, distance)
    spaced = torch.randn(3, 211)[:, ::3][:, :70].copy_(logits)
    for other in (logits.t().contiguous().t(), spaced):
        result = run_loss(other, labels.repeat_interleave(3)[::3], distance)
        # Other strides may take other vectors, and sums another order.
        torch.testing.assert_close(result.loss, expected.loss, rtol=1e-6, atol=0)
        assert relative(result.grad, expected.grad) <= TOLERANCE[path_dtype]
    for one in (torch.randn(1, 70), torch.randn(3, 1)):  # a stride of 0
        expanded, copied = (run_loss(z, labels, distance) for z in (one.expand(3, 70), one.expand(3, 70).clone()))
        assert relative(expanded.grad, copied.grad) <= TOLERANCE[path_dtype]


@gpu_too
@pytest.mark.parametrize("strides", [(1_300_000_000, 1), (1, 1_300_000_000)], ids=["rows", "classes"])
@pytest.mark.usefixtures("path_dtype")
def test_addresses_beyond_32_bits(strides: tuple[int, int], tmp_path: Path) -> None:
    rows, classes = 3, 4
    span = 1 + (rows - 1) * strides[0] + (classes - 1) * strides[1]
    if DEVICE.type == "cuda":
        memory = torch.zeros(span, dtype=torch.float16, device=DEVICE)
    else:  # a sparse file: gigabytes of address space, kilobytes of disk
        memory = torch.from_file(str(tmp_path / "sparse"), shared=True, size=span, dtype=torch.float16)
    far = memory.as_strided((rows, classes), strides)
    far.copy_(torch.randn(rows, classes))
    near = far.contiguous()
    labels, distance = torch.tensor([0, 3, 1], device=DEVICE), torch.rand(3, device=DEVICE)
    summary = reference.batch_summary(near, labels, distance)
    grads, sums = [], []
    for z in (far, near):
        sums.append(summary.clone())
        grads.append(kernels.loss_forward(z, labels, distance, summary.clone(), new_tickets(), **LOSS_OPTIONS)[1])
        kernels.batch_sums(z, labels, distance, sums[-1], new_tickets(), confidence_threshold=0.0, ignore_index=-100)
    assert torch.equal(*grads)
    assert torch.equal(*sums)


@every_variant
def test_part_of_a_larger_batch(path_dtype: torch.dtype, variant: str) -> None:
    """Distributed runs give each rank the summary of all: minimum, maximum, and sums divided by the number of ranks,
    so that the number of valid rows need not be whole."""
    logits, _, labels = random_batch(7, 70)
    logits = logits.to(path_dtype)
    labels[0] = -100
    distance = torch.rand(7)
    whole = reference.batch_summary(logits, labels, distance)
    whole[2:] /= 2
    total, grads = 0.0, []
    for part in (slice(0, 3), slice(3, 7)):
        result = run_loss(logits[part], labels[part], distance[part], whole, variant=variant)
        expected, _ = reference_loss(logits[part], labels[part], distance[part], variant=variant, summary=whole)
        assert relative(result.loss, expected) <= 1e-5
        total += float(result.loss) / 2
        grads.append(result.grad / 2)
    together = run_loss(logits, labels, distance, variant=variant)
    assert total == pytest.approx(float(together.loss), rel=1e-5)
    assert relative(torch.cat(grads), together.grad) <= TOLERANCE[path_dtype]


def test_label_out_of_range_reads_nothing_outside(path_dtype: torch.dtype) -> None:
    logits, labels, distance = torch.randn(3, 70).to(path_dtype), torch.tensor([70, -1, 10**15]), torch.rand(3)
    summary = torch.tensor([0, 1, 3, 0, 3, 0, 3], dtype=torch.float64)
    result = run_loss(logits, labels, distance, summary)
    assert not result.correct.any()
    assert not result.accepted.any()


@gpu_too
@every_variant
def test_results_are_deterministic(path_dtype: torch.dtype, variant: str) -> None:
    rows, repeats = (3, 1) if DEVICE.type == "cpu" else (500, 50)
    logits, _, labels = random_batch(rows, 70)
    logits = logits.to(path_dtype)
    distance, tickets = torch.rand(rows), new_tickets()
    first = run_loss(logits, labels, distance, tickets=tickets, variant=variant)
    for _ in range(repeats):
        again = run_loss(logits, labels, distance, tickets=tickets, variant=variant)
        assert torch.equal(again.loss, first.loss)
        assert torch.equal(again.grad, first.grad)


def test_user_chosen_numbers_are_not_compiled_in() -> None:
    """Temperatures, thresholds and smoothing reach the kernel through memory: kernel arguments would be rounded to
    float32, and constants would compile one kernel per value."""
    planned: list[launch.Launch] = []
    logits, labels, distance, summary = on_device(
        torch.randn(4, 9), torch.zeros(4, dtype=torch.int64), torch.rand(4), torch.ones(7, dtype=torch.float64)
    )
    for t_max, t_wrong, smoothing, threshold in ((100.0, 20.0, 0.1, 0.0), (33.3, 21.0, 0.2, 0.5)):
        changes = {"t_max": t_max, "t_wrong": t_wrong, "label_smoothing": smoothing, "confidence_threshold": threshold}
        with launch.replaced(planned.append):
            loss.loss_forward(logits, labels, distance, summary, new_tickets(), **{**LOSS_OPTIONS, **changes})
            sums.batch_sums(
                logits, labels, distance, summary, new_tickets(), confidence_threshold=threshold, ignore_index=-100
            )
    assert len(planned) == 4
    for one, other in ((planned[0], planned[2]), (planned[1], planned[3])):
        assert one.constants == other.constants
        assert not any(isinstance(v, float) for v in (*one.arguments, *one.constants.values()))


# The golden cases of more than a thousand logits take seconds in the interpreter.
GOLDEN = [
    pytest.param(case, marks=pytest.mark.slow) if golden(case)["logits"].numel() > 1000 else case for case in CASES
]


@gpu_too
@every_variant
@pytest.mark.parametrize("case", GOLDEN)
def test_golden_loss_and_gradient(case: str, variant: str) -> None:
    g = golden(case)
    result = run_loss(
        g["logits"].double(),
        g["labels"],
        g["distance"].double(),
        **options(g, variant),
        warmup=bool(g["warmup"]) or not g["queue_mean"].numel(),
    )
    assert relative(result.loss, g[f"{variant}/loss"]) <= 1e-12
    assert relative(result.grad, g[f"{variant}/grad"]) <= 1e-7
    assert torch.equal(result.correct, g["correct"])


def run_sums(logits: Tensor, labels: Tensor, distance: Tensor, summary: Tensor, threshold: float) -> Tensor:
    """The summary with its values 3 to 5 computed by the kernel."""
    unfinished = summary.clone()
    unfinished[3:6] = torch.nan
    tickets = new_tickets()
    moved = on_device(logits, labels, distance, unfinished)
    kernels.batch_sums(*moved, tickets, confidence_threshold=threshold, ignore_index=-100)
    assert not tickets.any()
    return moved[3].cpu()


@gpu_too
@pytest.mark.parametrize("programs", [3, 64])
@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [
        (0, 5, torch.float32),
        (1, 1, torch.float32),
        *((33, 10, dtype) for dtype in TOLERANCE),
        (3, 2500, torch.bfloat16),  # three blocks
        (5, 1003, torch.float64),
    ],
    ids=str,
)
def test_batch_sums(
    rows: int, classes: int, dtype: torch.dtype, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "num_programs_for", lambda turns, per_multiprocessor, target: programs)
    logits, labels = torch.randn(rows, classes).to(dtype), torch.randint(classes, (rows,))
    labels = torch.where(torch.rand(rows) < 0.6, logits.float().argmax(1), labels) if rows else labels
    distance = torch.rand(rows)
    if rows > 30:
        labels[4] = labels[17] = -100
        logits[4] = torch.nan
        logits[6, int(labels[6])] = torch.inf
        distance[9], distance[17], distance[20] = torch.inf, torch.nan, torch.nan
    expected = reference.batch_summary(logits, labels, distance, confidence_threshold=0.1)
    sums = run_sums(logits, labels, distance, expected, 0.1)
    assert torch.equal(sums[:5], expected[:5])
    torch.testing.assert_close(sums[5], expected[5], rtol=1e-12, atol=0)


@gpu_too
def test_more_programs_than_partial_sums_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "num_programs_for", lambda turns, per_multiprocessor, target: turns)
    monkeypatch.setattr(layout, "loss_config", lambda *_: layout.LossConfig(1, 1, 2, True, 1, 1))
    rows = 10
    if DEVICE.type == "cpu":  # the compiler takes the constant as it was at first
        monkeypatch.setattr(rows_module, "PARTS", tl.constexpr(4))
    else:
        rows += rows_module.PARTS.value
    logits, labels, distance = torch.randn(rows, 2), torch.randint(2, (rows,)), torch.rand(rows)
    expected = reference.batch_summary(logits, labels, distance)
    sums = run_sums(logits, labels, distance, expected, 0.0)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    check_loss(logits, labels, distance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 200_000])  # the last: more blocks than programs
def test_scale_multiplies_in_place(size: int, dtype: torch.dtype) -> None:
    for factor in (1.0, -2.5, 0.0):
        values = torch.randn(size).to(dtype)
        expected = (values.double() * factor).to(dtype)
        (moved,) = on_device(values.clone())
        assert kernels.scale(moved, torch.tensor(factor, device=DEVICE), dtype) is moved
        torch.testing.assert_close(moved.cpu(), expected)


def test_scale_rounds_to_another_dtype_once() -> None:
    values = torch.randn(5000) * 1e-7
    (moved,) = on_device(values.clone())
    scaled = kernels.scale(moved, torch.tensor(2.0**14, device=DEVICE), torch.float16)
    assert torch.equal(scaled.cpu(), (values * 2.0**14).half())
    assert torch.equal(moved.cpu(), values)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("classes", "dtype", "variant"),
    [
        *((c, d, "paper") for c in (10, 1000, 4096, 16384, 131072) for d in (torch.float32, torch.bfloat16)),
        *((c, torch.float16, "released") for c in (100, 8192, 21841)),
    ],
    ids=str,
)
def test_error_bound_at_training_sizes(classes: int, dtype: torch.dtype, variant: str) -> None:
    logits, _, labels = random_batch(257 if classes < 10_000 else 33, classes)
    check_loss(logits.to(dtype), labels, torch.rand(len(labels)), variant=variant, label_smoothing=0.1)
