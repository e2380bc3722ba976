"""Host time of an eager step with the Triton backend, its launches left out: ``python -m bench.host_time``.

Needs no GPU: the tensors are small and on the CPU, and labels and cursor are not checked, as they are not on GPUs. What
it leaves out are Triton's own microseconds a launch; ``bench.gpu`` measures the whole on a GPU (``host_us``).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from unittest.mock import patch

import torch

from bench.harness import host_time, launch_replaced
from tal_fast import TALLoss
from tal_fast.loss import options
from tal_fast.loss.ring import RingBuffer

WAYS = ("forward", "forward and backward", "loss_and_gradient")


def steps(variant: str) -> list[Callable[[], object]]:
    """A step in each of ``WAYS``."""
    loss_fn = TALLoss(variant, queue_size=100, backend="triton")  # type: ignore[arg-type]
    loss_fn.watch = None  # it looks at what no kernel has written
    logits = torch.rand(8, 10).requires_grad_()
    features, labels = torch.rand(8, 16), torch.randint(10, (8,))

    def forward_and_backward() -> None:
        loss = loss_fn(logits, features, labels)
        torch.autograd.grad(loss, logits)

    return [
        lambda: loss_fn(logits, features, labels),
        forward_and_backward,
        lambda: loss_fn.loss_and_gradient(logits, features, labels),
    ]


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of a step by variant and way, the least of the rounds; and its number of launches."""
    found: dict[str, dict[str, float]] = {}
    with (
        patch.object(options, "labels_are_checked", lambda labels: False),
        patch.object(RingBuffer, "check", lambda self, wait=False: None),
    ):
        for variant in ("paper", "released"):
            found[variant] = {}
            for way, step in zip(WAYS, steps(variant), strict=True):
                launches: list[object] = []
                with launch_replaced(launches.append):
                    step()
                found[variant]["launches"] = len(launches)
                with launch_replaced(lambda launch: None):
                    found[variant][way] = 1e6 * host_time(step, lambda: None, repeats=1, rounds=rounds)
    return found


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # so that the backend takes CPU tensors; Triton is not imported yet
    for variant, times in measure(5000).items():
        each = ", ".join(f"{way} {times[way]:.0f} us" for way in WAYS)
        print(f"{variant}, {times['launches']:.0f} launches left out: {each}")


if __name__ == "__main__":
    main()
