"""Benchmark of feature statistics and nearest distance beside other exact searches.

Bytes of one call: the features, read once. Operations: B·N comparisons at 6 each, which brute force needs and an index
need not. Peers: plain PyTorch, torch.cdist, faiss's flat index, SciPy's k-d tree; what they need built is built
beforehand (``bench_queue`` counts it). The gate is float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from bench.batches import FreshFeatures, fill
from bench.harness import CannotRun, sets_beyond_cache
from tal_fast import FeatureQueue
from tal_fast.loss import dispatch, reference

OPERATIONS_A_PAIR = 6  # two differences, two squares, a sum, a minimum


@dataclass(frozen=True)
class Case:
    peer: str
    B: int
    D: int
    N: int
    dtype: str = "float32"
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.peer}-B{self.B}-D{self.D}-N{self.N}-{self.dtype}-{self.threads}t"


PEERS = ("tal_fast", "brute_force", "reference", "cdist", "faiss_flat", "ckdtree")
CDIST_LIMIT = 1_000_000  # of entries: it makes a B x N matrix, 512 MB at B = 128
FULL = [
    *(
        Case(peer, 128, 512, n)
        for n in (1_000, 30_000, 880_880, 10_000_000)
        for peer in PEERS
        if peer != "cdist" or n <= CDIST_LIMIT
    ),
    *(Case(peer, 128, d, 30_000) for d in (64, 2048, 4096) for peer in ("tal_fast", "reference")),
    *(Case("tal_fast", 128, d, 30_000, "bfloat16") for d in (512, 2048)),
    *(Case("tal_fast", b, 512, 30_000) for b in (32, 1024, 16_384)),
    *(Case("tal_fast", 1024, 2048, 880_880, threads=t) for t in (1, 2)),
]
SMOKE = [Case(peer, 128, 64, 30_000) for peer in ("tal_fast", "brute_force")]
GPU = [
    Case(peer, b, d, n)
    for b, d, n in ((256, 2048, 20_000), (256, 2048, 880_880), (1024, 512, 880_880))
    for peer in ("tal_fast", "reference", "cdist")
]


class Problem:
    """Features of a batch, a full queue, and the expected distances."""

    def __init__(self, B: int, D: int, N: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.features = FreshFeatures(B, D, device).features.to(dtype)
        self.labels = torch.zeros(B, dtype=torch.int64, device=device)
        self.queue = FeatureQueue(N, device=device)
        fill(self.queue.push, N, device)
        self.ring = torch.stack([self.queue.ring.mean, self.queue.ring.std], dim=1)  # (N, 2)
        statistics = torch.stack(reference.feature_statistics(self.features, torch.float64))
        ring = self.ring.double().unbind(1)
        # Some rows at a time: the reference makes a B x 65,536 matrix, which at B = 16,384 would be 8 GB.
        parts = [reference.nearest_distance(*rows, *ring) for rows in statistics.split(512, dim=1)]
        self.expected = torch.cat(parts)


@lru_cache(maxsize=1)
def problem(B: int, D: int, N: int, dtype: str, device: torch.device) -> Problem:
    return Problem(B, D, N, getattr(torch, dtype), device)


def make_peer(name: str, p: Problem) -> Callable[[Tensor], Tensor]:
    """Distance function of a peer: (B, D) features -> (B,) distances.

    Raises:
        CannotRun: it is not installed, or not for this device.
    """
    device = p.features.device
    if name == "tal_fast":
        backend = dispatch.for_device("auto", device)
        return lambda f: backend.statistics_distance(f, p.labels, p.queue.ring, -100).distance
    if name == "brute_force":
        if p.queue.ring.index is None:
            raise CannotRun("without an index, brute force is what tal_fast runs")
        q = p.queue.ring
        return lambda f: torch.ops.tal_fast.statistics_distance(f, p.labels, q.mean, q.std, q.cursor, -100, None)[2]
    if name == "reference":
        return lambda f: reference.nearest_distance(
            *reference.feature_statistics(f), p.queue.ring.mean, p.queue.ring.std
        )

    def points(f: Tensor) -> Tensor:
        std, mean = torch.std_mean(f.float(), dim=1)
        return torch.stack([mean, std], dim=1)

    if name == "cdist":
        # By products of the points (its default here) the squares cancel: 5% off and more at these distances.
        mode = "donot_use_mm_for_euclid_dist"
        return lambda f: torch.cdist(points(f), p.ring, compute_mode=mode).amin(1)
    if device.type != "cpu":
        raise CannotRun(f"{name} is compared on the CPU")
    if name == "faiss_flat":
        try:
            import faiss
        except ImportError:
            raise CannotRun("faiss is not installed") from None
        faiss.omp_set_num_threads(torch.get_num_threads())
        faiss.cvar.distance_compute_blas_threshold = 1 << 30  # by products: as for cdist
        flat = faiss.IndexFlatL2(2)
        flat.add(p.ring.numpy())
        return lambda f: torch.from_numpy(flat.search(points(f).numpy(), 1)[0][:, 0]).clamp(min=0).sqrt()
    try:
        from scipy.spatial import cKDTree
    except ImportError:
        raise CannotRun("SciPy is not installed") from None
    tree = cKDTree(p.ring.numpy())
    return lambda f: torch.from_numpy(tree.query(points(f).double().numpy())[0])


def gate(what: object, got: Tensor, p: Problem) -> None:
    """Check a peer's distances to within the rounding of float32 statistics, about 1e-7 each."""
    error = float((got.double() - p.expected).abs().max())
    if not error <= 2e-6:
        raise AssertionError(f"the distance of {what} is off by {error:.1e} (limit 2e-06); not timed")


@pytest.mark.cases(FULL, SMOKE, gpu=GPU, group="typicalness")
def bench_typicalness(case: Case, measure: Callable[..., None], device: torch.device) -> None:
    p = problem(case.B, case.D, case.N, case.dtype, device)
    torch.set_num_threads(case.threads)
    run = make_peer(case.peer, p)
    gate(case, run(p.features), p)
    read = case.B * case.D * p.features.element_size()
    sets = [p.features.clone() for _ in range(sets_beyond_cache(device, read))]
    facts = {"floor": "torch.std_mean", "bytes": read}
    if case.peer != "tal_fast" or p.queue.ring.index is None:
        facts["operations"] = OPERATIONS_A_PAIR * case.B * case.N
    measure(
        [lambda f=features: run(f) for features in sets],
        lambda: torch.std_mean(sets[0], dim=1),
        case=case,
        facts=facts,
    )
