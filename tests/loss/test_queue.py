"""``FeatureQueue`` against a plain Python list, on every backend, and its state."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tal_fast import FeatureQueue, TALLoss
from tal_fast.loss import functional, ring
from tests.helpers.backends import DEVICE, NATIVE, every_backend
from tests.helpers.loss_cases import random_queue
from tests.helpers.queues import assert_nearest, brute_force

pytestmark = pytest.mark.usefixtures("poison")


def device_for(backend: str) -> torch.device:
    return torch.device("cpu") if backend == "reference" else DEVICE


@every_backend
@pytest.mark.parametrize("capacity", [1, 2, 7, 50, 64])
def test_push_appends_to_a_list_and_drops_the_oldest(backend: str, capacity: int) -> None:
    device = device_for(backend)
    queue = FeatureQueue(capacity, device=device, backend=backend)
    expected: list[tuple[float, float]] = []
    for rows in (0, 1, 3, 20, 6, 64, 65, 5, 0, 131, 9):
        mean, std = torch.randn(rows), torch.rand(rows)
        accepted = torch.rand(rows) < 0.7 if rows != 20 else torch.zeros(rows, dtype=torch.bool)
        if rows == 9:
            accepted = None
        if rows > 2:
            mean[1], std[2] = torch.nan, torch.inf
        queue.push(mean.to(device), std.to(device), None if accepted is None else accepted.to(device))
        keep = mean.isfinite() & std.isfinite()
        keep = keep if accepted is None else keep & accepted
        expected += list(zip(mean[keep].tolist(), std[keep].tolist(), strict=True))
        expected = expected[-capacity:]
        got = [t.cpu().tolist() for t in queue.contents()]
        assert list(zip(*got, strict=True)) == expected
        assert len(queue) == len(expected)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entries", [0, 1, 3, 15, 16, 17, 1023, 1024, 1025, 5000])
@pytest.mark.parametrize("rows", [0, 1, 4, 5, 33])
def test_nearest_equals_brute_force(backend: str, entries: int, rows: int, dtype: torch.dtype) -> None:
    device = device_for(backend)
    queue = FeatureQueue(5000, dtype=dtype, device=device, backend=backend)
    mean, std = (q.to(dtype) for q in random_queue(entries))
    queue.push(mean.to(device), std.to(device))
    m, s = (q.to(dtype) for q in random_queue(rows))
    got = queue.nearest(m.to(device), s.to(device))
    assert got.shape == (rows,)
    assert got.dtype == dtype
    if not entries:
        assert got.isposinf().all()
        return
    assert_nearest(got, brute_force(m, s, mean, std), backend)


@every_backend
def test_nearest_ignores_entries_that_have_left(backend: str) -> None:
    device = device_for(backend)
    queue = FeatureQueue(100, device=device, backend=backend)
    everything = torch.rand(2, 270)
    for part in everything.split(30, dim=1):
        queue.push(part[0].to(device), part[1].to(device))
    old, new = everything[:, :170], everything[:, 170:]
    assert (queue.nearest(*new.to(device)) == 0).all()
    assert_nearest(queue.nearest(*old.to(device)), brute_force(*old, *new), backend)


@every_backend
@pytest.mark.parametrize(
    "points",
    [
        torch.full((2, 300), 0.25),
        torch.cat([torch.rand(2, 299), torch.full((2, 1), 1e18)], 1),
        torch.rand(1, 300).expand(2, 300),
    ],
    ids=["all equal", "one far outlier", "collinear"],
)
def test_nearest_of_any_distribution(backend: str, points: torch.Tensor) -> None:
    device = device_for(backend)
    queue = FeatureQueue(300, device=device, backend=backend)
    queue.push(points[0].to(device), points[1].to(device))
    m, s = torch.rand(9), torch.rand(9)
    assert_nearest(queue.nearest(m.to(device), s.to(device)), brute_force(m, s, *points), backend)


@every_backend
def test_statistics_that_are_not_finite_have_no_distance(backend: str) -> None:
    device = device_for(backend)
    queue = FeatureQueue(10, device=device, backend=backend)
    queue.push(torch.rand(5, device=device), torch.rand(5, device=device))
    m = torch.tensor([0.5, torch.nan, torch.inf, 0.5, 0.5], device=device)
    s = torch.tensor([0.5, 0.5, 0.5, torch.nan, -torch.inf], device=device)
    assert queue.nearest(m, s).isfinite().tolist() == [True, False, False, False, False]


def test_state_dict_continues_the_queue() -> None:
    queue = FeatureQueue(10)
    queue.push(*random_queue(14))
    twin = FeatureQueue(10)
    twin.load_state_dict(copy.deepcopy(queue.state_dict()))
    more = random_queue(3)
    queue.push(*more)
    twin.push(*more)
    assert torch.equal(queue.contents()[0], twin.contents()[0])
    assert torch.equal(queue.contents()[1], twin.contents()[1])


@pytest.mark.parametrize(("size", "pushed"), [(4, 14), (10, 14), (30, 14), (30, 6), (4, 2)])
def test_loading_a_state_of_another_capacity_keeps_the_newest_entries(size: int, pushed: int) -> None:
    queue = FeatureQueue(10)
    queue.push(*random_queue(pushed))
    other = FeatureQueue(size)
    other.load_state_dict(queue.state_dict())
    want = queue.contents()[0][-size:]
    assert torch.equal(other.contents()[0], want)
    other.push(torch.tensor([7.0]), torch.tensor([1.0]))
    assert torch.equal(other.contents()[0], torch.cat([want, torch.tensor([7.0])])[-size:])


def test_state_dict_of_the_loss_is_loaded_strictly() -> None:
    loss_fn = TALLoss(queue_size=5)
    assert set(loss_fn.state_dict()) == {"queue.mean", "queue.std", "queue.cursor"}
    state = loss_fn.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        loss_fn.load_state_dict({k: v for k, v in state.items() if k != "queue.std"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loss_fn.load_state_dict({**state, "queue.more": torch.ones(1)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cursor": torch.tensor([11, 4])}, "lies outside a ring of 10"),
        ({"cursor": torch.tensor([0, -1])}, "lies outside a ring of 10"),
        ({"cursor": torch.tensor([0.0, 1.0])}, "2 int64 values"),
        ({"std": torch.rand(9)}, r"must both be \(N,\)"),
        ({"mean": torch.full((10,), torch.nan)}, "not finite"),
        ({"mean": "rubbish"}, "must be tensors"),
        ({"mean": torch.rand(10, dtype=torch.complex64)}, "real numbers, not torch.complex64"),
        ({"mean": torch.rand(10, device="meta")}, "real numbers, not torch.float32 and torch.float32 on meta"),
        ({"std": torch.full((10,), -0.1)}, "standard deviations below 0"),
    ],
)
def test_damaged_state_is_refused_and_the_queue_kept(change: dict, message: str) -> None:
    queue = FeatureQueue(10)
    queue.push(*random_queue(10))
    before = queue.contents()
    with pytest.raises(RuntimeError, match=message):
        queue.load_state_dict({**copy.deepcopy(queue.state_dict()), **change})
    assert torch.equal(queue.contents()[0], before[0])


@every_backend
@pytest.mark.parametrize("capacity", [50, 5000])
def test_modules_built_on_the_meta_device(backend: str, capacity: int) -> None:
    device = device_for(backend)
    with torch.device("meta"):
        loss_fn = TALLoss(queue_size=capacity, backend=backend)
    batch = torch.randn(4, 5, device=device), torch.rand(4, 6, device=device), torch.arange(4, device=device)
    with pytest.raises(ValueError, match=r"queue is on meta .* \.to_empty\(device="):
        loss_fn(*batch)
    with torch.device("meta"):  # which decides where a tensor without a named device lies
        loss_fn.to_empty(device=device)
    assert len(loss_fn.queue) == 0
    assert loss_fn(*batch).isfinite()
    loss_fn.queue.ring.cursor.fill_(-7)
    loss_fn.reset_parameters()
    fresh = TALLoss(queue_size=capacity, backend=backend).to(device)
    for _ in range(2):
        assert torch.equal(loss_fn(*batch), fresh(*batch))


def test_state_is_loaded_into_a_module_on_the_meta_device() -> None:
    queue = FeatureQueue(5000)
    queue.push(*random_queue(700))
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), FeatureQueue(5000))
    state = {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}
    model.load_state_dict({**state, **{f"1.{key}": t for key, t in queue.state_dict().items()}}, assign=True)
    queries = random_queue(9)
    assert torch.equal(model[1].nearest(*queries), queue.nearest(*queries))


def test_to_empty_leaves_an_empty_queue() -> None:
    model = torch.nn.Sequential(TALLoss(queue_size=5000))
    model[0].queue.push(*random_queue(5000))
    model.to(torch.float64)
    assert len(model[0].queue) == 5000
    model.to_empty(device="cpu")  # memory that the allocator gives may hold the old values
    assert len(model[0].queue) == 0
    assert model[0].queue.nearest(*(q.double() for q in random_queue(3))).isposinf().all()


GARBAGE = {
    "slot": [1 << 40, 3],
    "negative slot": [-1, 0],
    "count": [0, 1 << 40],
    "negative count": [2, -5],
}


@every_backend
@pytest.mark.parametrize("capacity", [50, 5000])
@pytest.mark.parametrize("cursor", GARBAGE.values(), ids=GARBAGE)
def test_cursor_of_uninitialised_memory_is_refused(backend: str, capacity: int, cursor: list[int]) -> None:
    loss_fn = TALLoss(queue_size=capacity, backend=backend)
    queue = loss_fn.queue
    queue.ring.cursor.copy_(torch.tensor(cursor))
    mean, std = random_queue(3)
    batch = torch.randn(3, 5), torch.rand(3, 6), torch.arange(3)
    for use in (
        lambda: queue.push(mean, std),
        lambda: queue.nearest(mean, std),
        lambda: loss_fn(*batch),
        lambda: loss_fn.loss_and_gradient(*batch),
        queue.contents,
        lambda: len(queue),
    ):
        with pytest.raises(RuntimeError, match=r"the queue's cursor \(.*\) lies outside a ring of .* call reset_param"):
            use()
    assert queue.ring.cursor.tolist() == cursor
    queue.reset()
    queue.push(mean, std)
    assert len(queue) == 3


@pytest.mark.parametrize("backend", ["reference", NATIVE])
@pytest.mark.parametrize("capacity", [50, 5000])
def test_threads_share_a_loss(backend: str, capacity: int) -> None:
    loss_fn = TALLoss(queue_size=capacity, backend=backend, confidence_threshold=-1.0)
    logits = torch.randn(500, 5)
    features = torch.rand(8, 500, 6)  # a batch for each thread
    statistics = [torch.stack(functional.feature_statistics(f)) for f in features]

    def train(thread: int) -> bool:
        finite = True
        for step in range(60):
            loss_fn.queue.push(*statistics[thread])
            loss_fn.queue.nearest(*statistics[thread][:, :16])
            if step % 6 == 0:
                finite = finite and bool(loss_fn(logits, features[thread], logits.argmax(1)).isfinite())
        return finite

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(train, range(8)))
    assert len(loss_fn.queue) == capacity
    assert int(loss_fn.queue.ring.cursor[0]) == 8 * (60 + 10) * 500 % capacity  # no push is lost
    entries = torch.stack(loss_fn.queue.contents())
    pushed = {tuple(entry) for batch in statistics for entry in batch.T.tolist()}
    assert {tuple(entry) for entry in entries.T.tolist()} <= pushed  # no mean with another's deviation
    queries = torch.stack(random_queue(9))
    assert_nearest(loss_fn.queue.nearest(*queries), brute_force(*queries, *entries), backend)


def test_queue_is_never_converted_to_half_precision() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), TALLoss(queue_size=5)])
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].queue.dtype == torch.float32
    assert model.double()[1].queue.dtype == torch.float64
    assert model.to("meta")[1].queue.device.type == "meta"


def test_queue_has_no_buffers_for_ddp_to_overwrite() -> None:
    assert not list(TALLoss(queue_size=5).buffers())
    assert not list(TALLoss(queue_size=5).parameters())


def test_invalid_arguments() -> None:
    with pytest.raises(ValueError, match="capacity is 0"):
        FeatureQueue(0)
    with pytest.raises(TypeError, match="float16"):
        FeatureQueue(5, dtype=torch.float16)
    queue = FeatureQueue(5)
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        queue.push(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match=r"must both be \(B,\)"):
        queue.nearest(torch.rand(3, 1), torch.rand(3, 1))
    with pytest.raises(TypeError, match="must be torch.bool"):
        queue.push(torch.rand(3), torch.rand(3), torch.ones(3))
    with pytest.raises(ValueError, match="accepted is"):
        queue.push(torch.rand(3), torch.rand(3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match="the queue is on cpu"):
        queue.push(torch.rand(3, device="meta"), torch.rand(3, device="meta"))
    assert len(queue) == 0


def test_compiled_steps_take_the_queue_as_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static marks of the queue's tensors: kept by conversions and loading, absent from the state dict."""
    monkeypatch.setattr(ring, "COMPILED_INTO_CUDA_GRAPHS", ("cpu",))
    loss_fn = TALLoss(queue_size=7, backend="reference").double()
    fresh = TALLoss(queue_size=7, backend="reference", t_max=50.0).to("meta").to_empty(device="cpu").double()
    fresh.load_state_dict(loss_fn.state_dict())
    assert all(not vars(tensor) for tensor in loss_fn.state_dict().values())
    static: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        for node in graph.graph.find_nodes(op="placeholder"):
            if "_dynamo_static_input_type" in node.meta.get("tensor_dict", {}):
                static.append(node.name)
        return graph

    z, f, y = torch.randn(4, 3).double(), torch.rand(4, 5).double(), torch.tensor([0, 2, 1, 1])
    expected = copy.deepcopy(fresh)(z, f, y)
    torch._dynamo.reset()
    compiled = torch.compile(fresh, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(z, f, y), expected)
    assert len(static) == 3
