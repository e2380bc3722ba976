"""Benchmark of the queue on the CPU: search and push by queue length and distribution of the points.

A run is the work of one training step: a search for B statistics and their push, with the upkeep of the index
(``csrc/index.h``). New grids of the index are rare and
long, so its figure is the mean over at least a tenth of the queue, in CPU time of the thread, which other processes do
not lengthen. Peers without rare parts are timed a few times: brute force, faiss's flat index (removal of the oldest and
addition), SciPy's k-d tree (built anew, for it takes no additions). The gate is brute force: equal to the bit for the
index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.batches import statistics
from bench.harness import CannotRun
from tal_fast import FeatureQueue
from tal_fast.loss import reference

Points = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    peer: str
    N: int
    distribution: str = "spread"
    B: int = 128

    def __str__(self) -> str:
        return f"{self.peer}-N{self.N}-{self.distribution}-B{self.B}"


class Source:
    """Batches of statistics drawn from a named distribution."""

    def __init__(self, distribution: str) -> None:
        self.distribution, self.drawn = distribution, 0

    def __call__(self, count: int) -> Points:
        mean, std = statistics(count)
        first, self.drawn = self.drawn, self.drawn + count
        if self.distribution == "equal":
            mean, std = torch.full_like(mean, 0.5), torch.full_like(std, 0.25)
        elif self.distribution == "outlier" and first == 0:
            mean[0] = 1e6
        elif self.distribution == "collinear":
            std = mean / 2
        elif self.distribution == "equal_means":
            mean = torch.full_like(mean, 0.5)
        elif self.distribution == "drifting":  # ten times larger after a million samples
            scale = 10 ** ((first + torch.arange(count)) / 1e6)
            mean, std = mean * scale, std * scale
        return mean, std


DISTRIBUTIONS = ("spread", "equal", "outlier", "collinear", "equal_means", "drifting")
PEERS = ("index", "brute_force", "faiss_flat", "ckdtree")
FULL = [
    *(Case("index", n) for n in (1_000, 20_000, 100_000, 880_880, 10_000_000)),
    *(Case(peer, n) for n in (20_000, 880_880) for peer in PEERS[1:]),
    Case("brute_force", 10_000_000),
    *(Case(peer, 880_880, d) for d in DISTRIBUTIONS[1:] for peer in PEERS if peer != "faiss_flat"),
]
SMOKE = [Case("index", 20_000), Case("brute_force", 20_000)]


class Rings:
    """First-in-first-out window for peers without one."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.points, self.at = torch.stack([mean, std], dim=1), 0

    def push(self, mean: Tensor, std: Tensor) -> None:
        slots = (self.at + torch.arange(mean.numel())) % len(self.points)
        self.points[slots] = torch.stack([mean, std], dim=1)
        self.at = int(slots[-1]) + 1


def make_peer(name: str, queue: FeatureQueue) -> Callable[[Tensor, Tensor], Tensor]:
    """Search-and-push step of a peer: (B,) means and standard deviations -> (B,) distances."""
    if name in ("index", "brute_force"):
        if name == "brute_force":
            queue.ring.index = None

        def own(mean: Tensor, std: Tensor) -> Tensor:
            distance = queue.nearest(mean, std)
            queue.push(mean, std)
            return distance

        return own
    window = Rings(*queue.contents())
    if name == "faiss_flat":
        try:
            import faiss
        except ImportError:
            raise CannotRun("faiss is not installed") from None
        faiss.omp_set_num_threads(1)
        faiss.cvar.distance_compute_blas_threshold = 1 << 30  # by products the squares cancel
        flat = faiss.IndexFlatL2(2)
        flat.add(window.points.numpy())

        def scan(mean: Tensor, std: Tensor) -> Tensor:
            points = torch.stack([mean, std], dim=1).numpy()
            distance = flat.search(points, 1)[0][:, 0]
            flat.remove_ids(faiss.IDSelectorRange(0, len(points)))
            flat.add(points)
            return torch.from_numpy(distance).clamp(min=0).sqrt()

        return scan
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        raise CannotRun("SciPy is not installed") from None

    def grow(mean: Tensor, std: Tensor) -> Tensor:
        tree = cKDTree(window.points.numpy())
        distance = tree.query(torch.stack([mean, std], dim=1).double().numpy())[0]
        window.push(mean, std)
        return torch.from_numpy(distance)

    return grow


@pytest.mark.cases(FULL, SMOKE, group="queue")
def bench_queue(case: Case, measure: Callable[..., None]) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    source = Source(case.distribution)
    queue = FeatureQueue(case.N)
    for start in range(0, case.N, 1 << 17):
        queue.push(*source(min(1 << 17, case.N - start)))
    batch = source(case.B)
    ring = queue.ring
    plain = reference.nearest_distance(*batch, ring.mean, ring.std)
    brute_force = torch.ops.tal_fast.nearest(ring.mean, ring.std, ring.cursor, *batch, None)
    step = make_peer(case.peer, queue)
    got = step(*batch)
    if not torch.allclose(got.double(), plain.double(), rtol=1e-3, atol=1e-6):
        raise AssertionError(f"{case} disagrees with the reference; not timed")
    if case.peer == "index" and not torch.equal(got, brute_force):
        raise AssertionError("the index disagrees with brute force; not timed")

    def prepare() -> None:
        nonlocal batch
        batch = source(case.B)

    slots = torch.arange(case.B)
    ring, entries = torch.zeros(2, case.B), torch.rand(2, case.B)

    def write() -> None:
        ring[:, slots] = entries

    amortised = case.peer == "index"
    measure(
        [lambda: step(*batch)],
        write,
        case=case,
        facts={"floor": "B entries written by index"},
        prepare=prepare,
        rounds=max(1000, -(-case.N // (10 * case.B))) if amortised else None,
    )
