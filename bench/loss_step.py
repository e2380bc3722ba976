"""The whole loss step, forward and backward and push, side by side on the CPU: ``python -m bench.loss_step``.

Compares the list queue of the released algorithm, the plain PyTorch reference, this package, and F.cross_entropy as the
floor, at the sizes of CIFAR-100 and of ImageNet, with 1 and 2 threads. Prints nothing unless all agree first.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import environment, time_side_by_side, write_json
from bench.list_queue import ListQueueTAL
from tal_fast import TALLoss

SIZES = {"cifar100": (128, 100, 64, 30_000), "imagenet": (64, 1000, 2048, 880_880)}  # B, C, D, N
SMOKE = {"smoke": (8, 10, 16, 100)}


def make_batch(rows: int, classes: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(rows, classes) * 3
    labels = torch.where(torch.rand(rows) < 0.6, logits.argmax(1), torch.randint(classes, (rows,)))
    return logits, torch.rand(rows, width) * (0.5 + torch.rand(rows, 1)), labels


def implementations(size: tuple[int, int, int, int]) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Every implementation of the step, with the same full queue."""
    _, _, _, entries = size
    mean, std = 0.3 + 0.4 * torch.rand(entries), 0.2 + 0.2 * torch.rand(entries)
    plain = ListQueueTAL(entries)
    plain.means, plain.stds = mean.tolist(), std.tolist()
    steps: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"list queue (released)": plain}
    for name, backend, variant in (
        ("reference (released)", "reference", "released"),
        ("tal_fast (released)", "auto", "released"),
        ("tal_fast (paper)", "auto", "paper"),
    ):
        loss_fn = TALLoss(variant, queue_size=entries, backend=backend)  # type: ignore[arg-type]
        loss_fn.queue.push(mean, std)
        steps[name] = loss_fn
    steps["F.cross_entropy"] = lambda logits, features, labels: F.cross_entropy(logits, labels)
    return steps


def check(steps: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]], batch: tuple[Tensor, Tensor, Tensor]) -> None:
    """The correctness gate: the variants ``released`` must agree on loss and gradient."""
    outcomes = {}
    for name, step in steps.items():
        if "released" in name:
            leaf = batch[0].clone().requires_grad_()
            loss = step(leaf, batch[1], batch[2])
            loss.backward()
            outcomes[name] = (loss.detach(), leaf.grad)
    base_loss, base_grad = outcomes["list queue (released)"]
    for name, (loss, grad) in outcomes.items():
        assert base_grad is not None
        assert grad is not None
        # Eager float32 itself is 1e-4 to 3e-3 off where the queue is dense: typicalness amplifies rounding.
        if abs(loss - base_loss) > 1e-2 * base_loss or (grad - base_grad).norm() > 1e-2 * base_grad.norm():
            raise SystemExit(
                f"{name} disagrees with the list queue (loss {loss:.6f} against {base_loss:.6f}); not timed"
            )


def measure(size: tuple[int, int, int, int], threads: int, repeats: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows, classes, width, _ = size
    steps = implementations(size)
    batch = make_batch(rows, classes, width)
    check(steps, batch)

    def runner(step: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
        leaf = batch[0].clone().requires_grad_()

        def run() -> None:
            step(leaf, batch[1], batch[2]).backward()
            leaf.grad = None

        return run

    return time_side_by_side({name: runner(step) for name, step in steps.items()}, repeats, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny size and few repeats, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the result here as JSON")
    args = parser.parse_args()
    result: dict[str, Any] = {"what": "loss step on the CPU", "environment": environment(), "results": []}
    for name, size in (SMOKE if args.smoke else SIZES).items():
        for threads in (1, 2):
            times = measure(size, threads, *((5, 1.0) if args.smoke else (400, 12.0)))
            slow, floor = times["list queue (released)"]["p20_ms"], times["F.cross_entropy"]["p20_ms"]
            print(f"\n{name}: B, C, D, N = {size}, {threads} thread(s)")
            for what, t in times.items():
                print(
                    f"  {what:24} p20 {t['p20_ms']:9.3f} ms  p50 {t['p50_ms']:9.3f}  p80 {t['p80_ms']:9.3f}"
                    f"  {slow / t['p20_ms']:7.1f}x list queue  {t['p20_ms'] / floor:7.1f}x cross-entropy"
                )
            result["results"].append({"name": name, "B, C, D, N": size, "threads": threads, "times": times})
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
