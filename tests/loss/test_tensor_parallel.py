"""Class-sharded logits: ranks with some of a row's columns equal one process with all of them. gloo, 2 to 4 ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tal_fast import TALLoss
from tal_fast.loss import functional
from tal_fast.loss._extension import triton_problem
from tests.helpers.backends import NEEDS_TRITON
from tests.helpers.loss_cases import exact, random_batch, random_queue, relative
from tests.helpers.ranks import run_ranks

ROWS, CLASSES = 12, 11
SPLITS = {2: [7, 4], 3: [2, 0, 9]}  # uneven; one rank without a class
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
BACKENDS = ["reference"] + (["triton"] if triton_problem(torch.device("cpu")) is None else [])
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"t_wrong": None, "confidence_threshold": 0.4},
    {"warmup": True},
    {"reduction": "sum", "class_weight": torch.tensor([1.0, 0.3, 0.0, 2.0, 0.5, 1.5, 0.7, 0.2, 1.1, 0.9, 0.6])},
]
# Label smoothing spreads over the classes by their weights, which each rank knows of its own columns.
OPTIONS += [{**OPTIONS[-1], "reduction": reduction, "label_smoothing": 0.1} for reduction in ("mean", "none")]
HUGE_OPTIONS = {"label_smoothing": 0.1, "class_weight": OPTIONS[-1]["class_weight"]}
Case = dict[str, Any]


def cases(world: int) -> list[Case]:
    """Options, whole logits, features, labels and a queue, the same on every rank."""
    found = []
    with torch.random.fork_rng():
        torch.manual_seed(world)
        for variant in ("paper", "released"):
            for options in OPTIONS:
                for dtype in TOLERANCE:
                    logits, features, labels = random_batch(ROWS, CLASSES)
                    labels[3] = -100
                    logits[3] = torch.nan  # ignored, and must not spread
                    logits[5, 1] = logits[5, 8] = 30.0  # a tie across ranks goes to the first class
                    labels[5] = 1
                    logits[6, 0] = logits[6, 10] = 30.0
                    labels[6] = 10
                    logits[7, int(labels[7])] += 40  # p > 0.999
                    features[9, 0] = torch.nan  # no statistics
                    wide = torch.float64 if dtype == torch.float64 else torch.float32
                    found.append(
                        {
                            "options": {"variant": variant, **options},
                            "dtype": dtype,
                            "batch": (logits.to(dtype), features.to(wide), labels),
                            "queue": tuple(q.to(wide) for q in random_queue(50)),
                        }
                    )
    return found


def columns_of(logits: Tensor, rank: int, world: int) -> Tensor:
    return logits.split(SPLITS[world], dim=1)[rank]


def sharded_losses(rank: int, world: int, group: dist.ProcessGroup) -> list[Any]:
    """Loss, gradient and statistics of each case, from this rank's columns."""
    results = []
    for case in cases(world):
        for backend in BACKENDS:
            logits, features, labels = case["batch"]
            part = columns_of(logits, rank, world).requires_grad_()
            loss, stats = functional.tal_loss(
                part, features, labels, *case["queue"], backend=backend, class_group=group, **case["options"]
            )
            (grad,) = torch.autograd.grad(loss.sum() * 3, part)
            results.append((loss.detach(), grad / 3, tuple(stats)))
    return results


def train_on_columns_and_rows(rank: int, class_group: dist.ProcessGroup, row_group: dist.ProcessGroup) -> Any:
    """Steps of two ranks of columns times two of rows, with one queue for all four."""
    rows, columns = rank // 2, rank % 2
    results = {}
    for variant in ("paper", "released"):
        loss_fn = TALLoss(
            variant, queue_size=20, queue_scope="global", process_group=row_group, class_group=class_group,
            label_smoothing=0.05, class_weight=OPTIONS[-1]["class_weight"],
        ).double()  # fmt: skip
        losses, grads = [], []
        for step, case in enumerate(cases(2)[:8]):
            logits, features, labels = (t[rows * 6 : rows * 6 + 6] for t in case["batch"])
            part = columns_of(logits.double(), columns, 2)
            if step % 2:
                loss, grad, _ = loss_fn.loss_and_gradient(part, features, labels)
            else:
                loss = loss_fn(part.requires_grad_(), features, labels)
                (grad,) = torch.autograd.grad(loss, part)
            losses.append(loss.detach())
            grads.append(grad)
        results[variant] = (torch.stack(losses), grads, loss_fn.queue.contents())
    return results


def invalid_labels_and_logits(rank: int, group: dist.ProcessGroup) -> Any:
    """Messages for two batches of invalid labels and for one class weight too few, then the step with an infinite logit
    on one rank.
    """
    torch.manual_seed(0)
    loss_fn = TALLoss(queue_size=10, class_group=group)
    logits, features = torch.randn(3, 4), torch.rand(3, 5)
    messages = []
    try:
        TALLoss(class_group=group, class_weight=torch.ones(7))(logits, features, torch.tensor([0, 1, 2]))
    except ValueError as error:
        messages.append(str(error))
    for labels in (torch.tensor([0, 7, 8]), torch.tensor([0, 1, 2 + rank])):
        try:
            loss_fn(logits, features, labels)
        except ValueError as error:
            messages.append(str(error))
    bad = torch.randn(3, 4)
    bad[1, 2] = torch.inf if rank == 1 else 0.0
    bad.requires_grad_()
    value, stats = loss_fn(bad, features, torch.tensor([0, 7, 5]), return_stats=True)
    value.backward()
    return messages, value.detach(), bad.grad, stats.accepted, len(loss_fn.queue)


def huge_logits_and_unequal_rows(rank: int, group: dist.ProcessGroup) -> Any:
    """Message of a first step with 3 rows on one rank and 4 on the other; then a step with logits about 1e20."""
    case = cases(2)[0]
    logits, features, labels = case["batch"]
    try:
        functional.tal_loss(
            logits[: 3 + rank].float(), features[: 3 + rank], labels[: 3 + rank], *case["queue"], class_group=group
        )
        message = ""
    except ValueError as error:
        message = str(error)
    part = columns_of(huge(logits), rank, 2).requires_grad_()
    loss, stats = functional.tal_loss(
        part, features, labels, *case["queue"], class_group=group, backend="reference", **HUGE_OPTIONS
    )
    (grad,) = torch.autograd.grad(loss, part)
    return message, loss.detach(), grad, stats.typicalness


def huge(logits: Tensor) -> Tensor:
    return logits.nan_to_num().float() * 1e20


def everything(rank: int) -> dict[str, Any]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    three = dist.new_group([0, 1, 2])
    row_groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    fresh = dist.new_group([0, 1])
    results = {"trained": train_on_columns_and_rows(rank, pairs[rank // 2], row_groups[rank % 2])}
    if rank < 2:
        results["world 2"] = sharded_losses(rank, 2, pairs[0])
        results["invalid"] = invalid_labels_and_logits(rank, pairs[0])
        results["huge"] = huge_logits_and_unequal_rows(rank, fresh)
    if rank < 3:
        results["world 3"] = sharded_losses(rank, 3, three)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of four ranks for all tests here: starting processes is what takes time."""
    return run_ranks(everything, 4, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("world", SPLITS)
def test_sharded_loss_equals_the_unsharded_one(world: int, ranks: list[dict[str, Any]]) -> None:
    results = iter(zip(*(rank[f"world {world}"] for rank in ranks[:world]), strict=True))
    for case in cases(world):
        logits, features, labels = case["batch"]
        leaf = logits.clone().requires_grad_()
        eager, eager_stats = functional.tal_loss(
            leaf, features, labels, *case["queue"], backend="reference", **case["options"]
        )
        (eager_grad,) = torch.autograd.grad(eager.sum(), leaf)
        for _ in BACKENDS:
            parts = next(results)
            loss, _, stats = parts[0]
            for other_loss, _, other_stats in parts[1:]:
                assert torch.equal(other_loss, loss)
                assert all(torch.equal(a, b) or a.isnan().any() for a, b in zip(other_stats, stats, strict=True))
            grad = torch.cat([part[1] for part in parts], dim=1)
            assert loss.dtype == eager.dtype
            assert loss.shape == eager.shape
            assert grad.dtype == logits.dtype
            _, typicalness, weight, temperature, correct, accepted = stats
            tolerance = TOLERANCE[case["dtype"]]
            assert torch.equal(correct, eager_stats.correct)
            assert torch.equal(accepted, eager_stats.accepted)
            assert correct[5]
            assert not correct[6]
            for got, want in zip((typicalness, weight, temperature), eager_stats[1:4], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
            if case["dtype"] == torch.float64:
                assert relative(loss, eager.detach()) <= tolerance
                assert relative(grad, eager_grad) <= tolerance
            else:
                clean = logits.nan_to_num()
                known = {
                    k: v for k, v in case["options"].items() if k not in ("warmup", "confidence_threshold")
                }  # what the loss depends on, given the typicalness
                truth = exact(clean, labels, typicalness, **known)
                eager_truth = exact(clean, labels, eager_stats.typicalness, **known)
                assert relative(loss, truth[0]) <= relative(eager, eager_truth[0]) + tolerance
                assert relative(grad, truth[1]) <= relative(eager_grad, eager_truth[1]) + tolerance


def test_columns_and_rows_shared_at_once(ranks: list[dict[str, Any]]) -> None:
    for variant in ("paper", "released"):
        weight = OPTIONS[-1]["class_weight"]
        loss_fn = TALLoss(
            variant, queue_size=20, label_smoothing=0.05, class_weight=weight, backend="reference"
        ).double()
        results = [rank["trained"][variant] for rank in ranks]
        for step, case in enumerate(cases(2)[:8]):
            logits, features, labels = case["batch"]
            leaf = logits.double().requires_grad_()
            loss = loss_fn(leaf, features, labels)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert relative((results[0][0][step] + results[2][0][step]) / 2, loss.detach()) <= 1e-12
            assert torch.equal(results[0][0][step], results[1][0][step])
            got = torch.cat([torch.cat([results[2 * r + c][1][step] for c in (0, 1)], 1) for r in (0, 1)]) / 2
            assert relative(got, grad) <= 1e-12
        assert len(loss_fn.queue) == 20
        for _, _, queue in results:
            for got, same, want in zip(queue, results[0][2], loss_fn.queue.contents(), strict=True):
                assert torch.equal(got, same)
                torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_invalid_labels_and_infinite_logits_are_noticed_by_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[:2]:
        messages, loss, grad, accepted, length = rank["invalid"]
        assert len(messages) == 3
        assert "class_weight has 7 weights but the logits 8 classes" in messages[0]
        assert "label 8 in row 2 is outside [0, 8)" in messages[1]
        assert "labels differ between the ranks" in messages[2]
        assert loss.isnan()  # on both ranks, though only one has the infinite logit
        assert grad[1].isnan().all()
        assert grad[[0, 2]].isfinite().all()
        assert not accepted[1]
        assert length == int(accepted.sum())


def test_unequal_rows_are_refused_and_huge_logits_have_a_direction(ranks: list[dict[str, Any]]) -> None:
    (message, loss, grad0, typicalness), (other, _, grad1, _) = ranks[0]["huge"], ranks[1]["huge"]
    assert message == other
    assert "rank 0 has 3 and rank 1 has 4" in message
    case = cases(2)[0]
    want_loss, want_grad = exact(huge(case["batch"][0]), case["batch"][2], typicalness, **HUGE_OPTIONS)
    assert relative(loss, want_loss) <= 1e-5
    assert relative(torch.cat([grad0, grad1], 1), want_grad) <= 1e-5


def test_global_scope_must_name_its_ranks(tmp_path: Any) -> None:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        with pytest.raises(ValueError, match="needs process_group"):
            TALLoss(queue_scope="global", class_group=dist.group.WORLD)
        logits, features, labels = random_batch(8, 5)
        alone = TALLoss(queue_size=5, class_group=dist.group.WORLD)(logits, features, labels)
        assert relative(alone, TALLoss(queue_size=5)(logits, features, labels)) <= 1e-6
    finally:
        dist.destroy_process_group()


@NEEDS_TRITON
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 511, 512, 1100])
def test_triton_passes_equal_the_plain_ones(columns: int, dtype: torch.dtype) -> None:
    from tal_fast.kernels import sharded as kernels
    from tal_fast.loss import tensor_parallel as plain

    logits = torch.randn(5, 2 * columns + 2).to(dtype)[:, 1 : 1 + 2 * columns : 2]
    assert logits.shape[1] == columns
    if columns > 600:
        logits[1, 40] = logits[1, 600] = 12.0  # ties across blocks
        logits[2, 41] = logits[2, 553] = 12.0  # in one lane of two blocks
        logits[3, columns - 1] = torch.inf
    label_column = torch.tensor([-1, 0, columns - 1, columns // 2, -1]).clamp(max=columns - 1)
    torch.testing.assert_close(kernels.scan(logits), plain._scan(logits), rtol=1e-6, atol=1e-5)
    z_max, scale = torch.full((5,), 13.0).double(), torch.rand(5).double()
    good = torch.tensor([0, 1, 2, 4])
    sums = [f(logits, label_column, z_max, scale)[good] for f in (plain._exp_sums, kernels.exp_sums)]
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-12)
    valid, terms = torch.tensor([True, True, False, True, True]), torch.rand(5, 7).double()
    terms[:, 0], terms[3, 6] = 13.0, torch.nan
    grads = [f(logits, label_column, valid, terms) for f in (plain._gradient, kernels.gradient)]
    assert grads[0].dtype == grads[1].dtype
    assert (grads[1][2] == 0).all()
    assert grads[1][3].isnan().all()
    torch.testing.assert_close(*grads, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6, equal_nan=True)
