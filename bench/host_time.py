"""Host time of an eager step with the Triton backend, without a GPU: ``python -m bench.host_time``.

Small tensors on the CPU, kernels compiled for an H100, and a driver that launches nothing; labels and cursor are not
checked, as they are not on GPUs. What is left out are CUDA's own microseconds a launch; ``bench.gpu`` measures the
whole on a GPU (``host_us``).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import torch

from bench.harness import host_time
from tal_fast import TALLoss, kernels
from tal_fast.kernels import launch
from tal_fast.loss import options
from tal_fast.loss.ring import RingBuffer

WAYS = ("forward", "forward and backward", "loss_and_gradient")


class Driver:
    """Stands in for Triton's driver of an H100; ``launched`` are the launches' functions and arguments."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        self.launched: list[tuple[object, ...]] | None = None
        self.utils = SimpleNamespace(
            load_binary=lambda name, *_: (1, object(), 32, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        )

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        def run(x: int, y: int, z: int, stream: int, function: object, a: object, b: object, c: object, d: object,
                *arguments: object) -> None:  # fmt: skip
            if self.launched is not None:
                self.launched.append((function, (x, y, z), *arguments))

        return run


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
    """Microseconds of a step by variant and way, the least of the rounds; and without its launches."""
    from triton.runtime import driver

    driver.set_active(Driver())
    found: dict[str, dict[str, float]] = {}
    with (
        patch.object(kernels, "is_available", lambda device: (True, "")),
        patch.object(options, "labels_are_checked", lambda labels: False),
        patch.object(RingBuffer, "check", lambda self, wait=False: None),
    ):
        for variant in ("paper", "released"):
            found[variant] = {}
            for way, step in zip(WAYS, steps(variant), strict=True):
                step()  # compiles
                found[variant][way] = 1e6 * host_time(step, lambda: None, repeats=1, rounds=rounds)
                with patch.object(launch.Launch, "run", lambda *_: None):
                    without = 1e6 * host_time(step, lambda: None, repeats=1, rounds=rounds)
                found[variant][f"{way} without launches"] = without
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5000, help="measurements, of which the least counts (5000)")
    args = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is 1, which replaces the compiler; unset it")
    for variant, times in measure(args.rounds).items():
        print(f"{variant}: {', '.join(f'{way} {us:.0f} us' for way, us in times.items())}")


if __name__ == "__main__":
    main()
