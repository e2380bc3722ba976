"""Kernels, whole loss steps and training steps on a GPU, as JSON: ``python -m bench.gpu --out FILE``.

Kernels are timed by replaying a CUDA graph that runs them over several sets of inputs, together at least three times
the L2 cache, so that every launch reads its inputs from device memory as it does in training. Every time is a p20, p50
and p80 over replays. Nothing is timed before its result agrees with the reference. ``--smoke`` runs tiny shapes on the
CPU (the Triton kernels in the interpreter) with the same code, timed by the clock.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import environment, percentiles, time_side_by_side, write_json
from tal_fast import TALLoss, reference
from tal_fast.backends import triton_problem

LOSS_SHAPES = [(256, 1000), (16384, 1000), (4096, 21841), (4096, 131072)]  # B, C
QUEUE_SHAPES = [(256, 2048, 20_000), (256, 2048, 880_880), (1024, 512, 880_880)]  # B, D, N
STEP_SHAPES = [(128, 100, 64, 30_000), (256, 1000, 2048, 880_880)]  # B, C, D, N


class Timer:
    """Times functions over rotating inputs, on the GPU by graph replay and on the CPU by the clock."""

    def __init__(self, device: torch.device, smoke: bool) -> None:
        self.device, self.smoke = device, smoke
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0

    def sets(self, bytes_per_set: int) -> int:
        """How many sets of inputs together exceed three times the L2 cache."""
        return 2 if self.smoke else max(2, min(64, 1 + 3 * self.l2 // max(1, bytes_per_set)))

    def __call__(self, calls: list[Callable[[], object]], replays: int = 30) -> dict[str, float]:
        """Time of one call, the calls being the same work on different inputs."""
        if self.device.type == "cpu":
            taken = [time_side_by_side({"": call}, 3, 1.0)[""]["p20_ms"] / 1e3 for call in calls]
            return percentiles(taken)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls[:2] * 2:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]  # outputs stay alive, so that no launch reuses another's memory
        graph.replay()
        taken = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3 / len(calls))
        del kept, graph
        return percentiles(taken)


def copy_bandwidth(timer: Timer) -> float:
    """Bytes read and written a second by a large copy on the device."""
    size = 1 << (16 if timer.smoke else 30)
    source = torch.empty(size, dtype=torch.uint8, device=timer.device)
    target = torch.empty_like(source)
    return 2 * size / (timer([lambda: target.copy_(source)])["p20_ms"] / 1e3)


def agree(what: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """The correctness gate."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error <= tolerance:
        raise AssertionError(f"{what} is off by {error:.2e} (limit {tolerance:.0e}); not timed")


def loss_kernel(timer: Timer, rows: int, classes: int, dtype: torch.dtype, bandwidth: float) -> dict[str, Any]:
    """Loss and gradient in one pass, beside cross-entropy forward and backward."""
    from tal_fast import kernels

    device = timer.device
    size = rows * classes * dtype.itemsize
    logits = [torch.randn(rows, classes, device=device).mul_(3).to(dtype) for _ in range(timer.sets(2 * size))]
    labels = logits[0].argmax(1)
    labels[::3] = 0
    distance = torch.rand(rows, device=device)
    batch = torch.zeros(6, dtype=torch.float64, device=device)
    batch[0], batch[1], batch[2] = distance.min(), distance.max(), rows
    ticket = torch.zeros(1, dtype=torch.int32, device=device)
    options: dict[str, Any] = {
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

    def tal(z: Tensor) -> Any:
        return kernels.loss_forward(z, labels, distance, batch, ticket, **options)

    leaf = logits[0].float().requires_grad_()
    want, _ = reference.tal_loss(leaf, labels, distance)
    want.backward()
    loss, grad = tal(logits[0])[:2]
    assert leaf.grad is not None
    agree("the loss", loss, want.detach(), 1e-4)
    agree("the gradient", grad, leaf.grad, 1e-2)
    del leaf, grad

    def cross_entropy(z: Tensor) -> Tensor:
        z = z.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(z.float(), labels), z)[0]

    compiled = torch.compile(cross_entropy) if not timer.smoke else cross_entropy
    result: dict[str, Any] = {"B": rows, "C": classes, "dtype": str(dtype), "bytes": 2 * size}
    for name, run in (("tal", tal), ("cross_entropy_eager", cross_entropy), ("cross_entropy_compiled", compiled)):
        try:
            t = timer([lambda z=z, run=run: run(z) for z in logits])
            rate = 2 * size / (t["p20_ms"] / 1e3)
            result[name] = {**t, "GB_per_s": rate / 1e9, "share_of_copy": rate / bandwidth}
        except Exception as error:
            result[name] = {"failed": str(error).splitlines()[0][:200]}
    return result


def distance_kernel(timer: Timer, rows: int, width: int, entries: int) -> dict[str, Any]:
    """Statistics and nearest distance."""
    from tal_fast import kernels

    device = timer.device
    features = [torch.rand(rows, width, device=device) for _ in range(timer.sets(rows * width * 4))]
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    mean, std = 0.4 + 0.2 * torch.rand(entries, device=device), 0.2 + 0.2 * torch.rand(entries, device=device)
    cursor = torch.tensor([0, entries], device=device)
    ticket = torch.zeros(1, dtype=torch.int32, device=device)

    def run(f: Tensor) -> Any:
        return kernels.statistics_distance(f, labels, mean, std, cursor, ticket, ignore_index=-100)

    m, s, d, _ = run(features[0])
    agree("the mean", m, features[0].double().mean(1), 1e-6)
    agree("the distance", d, reference.nearest_distance(m, s, mean, std), 1e-5)
    t = timer([lambda f=f: run(f) for f in features])
    pairs = rows * entries
    return {"B": rows, "D": width, "N": entries, **t, "pairs_per_s": pairs / (t["p20_ms"] / 1e3)}


def loss_step(timer: Timer, variant: str, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Statistics, distance, loss, gradient and push, as a training step runs them."""
    rows, classes, width, entries = shape
    device = timer.device
    loss_fn = TALLoss(variant, queue_size=entries, backend="triton").to(device)  # type: ignore[arg-type]
    loss_fn.queue.push(0.4 + 0.2 * torch.rand(entries, device=device), 0.2 + 0.2 * torch.rand(entries, device=device))
    logits = torch.randn(rows, classes, device=device)
    labels = logits.argmax(1)
    labels[::3] = 0
    features = torch.rand(rows, width, device=device)
    leaf = logits.clone().requires_grad_()

    def run() -> Any:
        return torch.autograd.grad(loss_fn(leaf, features, labels), leaf)

    def floor() -> Any:
        return torch.autograd.grad(F.cross_entropy(leaf, labels), leaf)

    eager = time_side_by_side({"tal": lambda: sync(run), "cross_entropy": lambda: sync(floor)}, 200, 2.0)
    result: dict[str, Any] = {"variant": variant, "B, C, D, N": shape, "eager": eager}
    result["graph"] = {"tal": timer([run] * 10), "cross_entropy": timer([floor] * 10)}
    return result


def sync(run: Callable[[], Any]) -> None:
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def training_step(timer: Timer, smoke: bool) -> dict[str, Any]:
    """ResNet-50, batch 256, bf16, channels_last, synthetic images in memory: CE and TAL in turns."""
    from torchvision.models import resnet18, resnet50

    from tal_fast.models import expose_features

    device = timer.device
    rows, side, entries = (4, 32, 100) if smoke else (256, 224, 880_880)
    images = torch.randn(rows, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (rows,), device=device)

    def make(tal: bool) -> Callable[[], None]:
        model: nn.Module = expose_features((resnet18 if smoke else resnet50)())
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=device.type == "cuda")
        loss_fn = TALLoss(queue_size=entries).to(device)
        loss_fn.queue.push(torch.rand(entries, device=device), torch.rand(entries, device=device))
        if not smoke:
            model.compile()

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits, features = model(images)
                loss = loss_fn(logits, features, labels) if tal else F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return lambda: sync(step)

    times = time_side_by_side({"ce": make(False), "tal": make(True)}, 5 if smoke else 60, 60.0)
    for t in times.values():
        t["images_per_s"] = rows / (t["p50_ms"] / 1e3)
    return {
        "model": "resnet18" if smoke else "resnet50",
        "batch": rows,
        "queue": entries,
        **times,
        "tal_over_ce": times["tal"]["p50_ms"] / times["ce"]["p50_ms"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device("cpu" if args.smoke or not torch.cuda.is_available() else "cuda")
    if device.type == "cpu" and not args.smoke:
        parser.error("no CUDA GPU is here; use --smoke to see that it runs")
    problem = triton_problem(device)
    if problem:
        parser.error(f"the Triton kernels do not run here: {problem}")
    torch.manual_seed(0)
    timer = Timer(device, args.smoke)
    bandwidth = copy_bandwidth(timer)
    result: dict[str, Any] = {
        "what": "tal_fast on a GPU" if not args.smoke else "smoke run on the CPU: the times mean nothing",
        "environment": environment(),
        "copy_GB_per_s": bandwidth / 1e9,
    }
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for rows, classes in [(4, 10), (2, 1003)] if args.smoke else LOSS_SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            jobs.append(("loss_kernel", lambda r=rows, c=classes, t=dtype: loss_kernel(timer, r, c, t, bandwidth)))  # type: ignore[misc]
    for shape in [(4, 16, 100)] if args.smoke else QUEUE_SHAPES:
        jobs.append(("distance_kernel", lambda s=shape: distance_kernel(timer, *s)))  # type: ignore[misc]
    for step_shape in [(4, 10, 16, 100)] if args.smoke else STEP_SHAPES:
        for variant in ("paper", "released"):
            jobs.append(("loss_step", lambda v=variant, s=step_shape: loss_step(timer, v, s)))  # type: ignore[misc]
    jobs.append(("training_step", lambda: training_step(timer, args.smoke)))
    failures = 0
    for name, job in jobs:
        try:
            outcome = job()
        except Exception as error:  # one figure that cannot be had must not cost the others
            outcome, failures = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}, failures + 1
        print(name, outcome, flush=True)
        result.setdefault(name, []).append(outcome)
        write_json(args.out, result)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
