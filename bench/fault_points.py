"""Training that dies by SIGKILL at a chosen point: ``python -m bench.fault_points POINT OPTIONS``.

POINT is who dies (``job``, ``rank1`` or ``host1``), a colon, and one of

- ``step:N:SECONDS``: so many seconds after this process's N-th optimizer step, wherever training is by then;
- ``layer:N:SKIP`` or ``validation:N:SKIP``: when a layer is called in training or in validation, SKIP such calls after
  the first that follows the N-th step;
- ``PHASE:N:SKIP``: at a phase of writing a file, SKIP such moments after the N-th step. The phases are
  ``half-written`` (the temporary file lost its second half), ``written`` (it is whole, under its temporary name),
  ``renaming`` (just before a rename) and ``renamed`` (just after).

``job`` is rank 0 and takes its launcher and the launcher's other ranks along, as a lost machine does, and ``host1`` is
rank 1 and does likewise; ``rank1`` takes only itself. The last two do so only before the first restart. Rank 0 may get
SIGTERM instead (``term``), an exception (``error``), or a weight that is not finite (``nan``). ``slow:step:0:SECONDS``
sleeps so long after every step of every rank, and ``rank1:option:0:OPTION`` gives rank 1 alone one more option.

Nothing here knows how the trainer works: it hooks PyTorch's optimizers and modules, and the system calls that all safe
writing of files rests on.
"""

from __future__ import annotations

import math
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PHASES = ("half-written", "written", "renaming", "renamed")


def children(pid: int) -> list[int]:
    """Process numbers of a process's children."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += map(int, task.read_text().split())
    return found


def die(who: str) -> None:
    """Kill this process, and unless it is ``rank1`` first its launcher and the launcher's other ranks."""
    if who == "term":
        os.kill(os.getpid(), signal.SIGTERM)
        return
    if who == "error":
        raise RuntimeError("an error that nobody expected")
    if who != "rank1" and "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = os.getppid()
        others = [pid for pid in children(launcher) if pid != os.getpid()]
        for pid in (launcher, *others):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Install the hooks that kill this process at the point."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    who, phase, step_text, extra = point.split(":")
    if who == "slow":
        register_optimizer_step_post_hook(lambda *_: time.sleep(float(extra)))
        return
    if os.environ.get("RANK", "0") != ("1" if who in ("rank1", "host1") else "0"):
        return
    if who in ("rank1", "host1") and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    last_step, steps, moments = int(step_text), 0, 0

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal steps
        steps += 1
        if who == "nan" and steps == last_step:
            optimizer.param_groups[0]["params"][0].data.fill_(math.nan)
            return
        if phase == "step" and steps == last_step:
            timer = threading.Timer(float(extra), die, [who])
            timer.daemon = True
            timer.start()

    def moment() -> bool:
        nonlocal moments
        if steps < last_step:
            return False
        moments += 1
        return moments > int(extra)

    def fsync(handle: int, real: Callable[[int], None] = os.fsync) -> None:
        is_file = stat.S_ISREG(os.fstat(handle).st_mode)
        if phase == "half-written" and is_file and moment():
            os.ftruncate(handle, os.fstat(handle).st_size // 2)
            die(who)
        real(handle)
        if phase == "written" and is_file and moment():
            die(who)

    def replace(*args: Any, real: Callable[..., None] = os.replace, **kwargs: Any) -> None:
        if phase == "renaming" and moment():
            die(who)
        real(*args, **kwargs)
        if phase == "renamed" and moment():
            die(who)

    def before_layer(module: torch.nn.Module, *_: Any) -> None:
        nonlocal last_step
        kind = "layer" if module.training else "" if torch.is_grad_enabled() else "validation"
        if phase == kind and moment():
            last_step = sys.maxsize  # once
            die(who)

    register_optimizer_step_post_hook(after_step)
    torch.nn.modules.module.register_module_forward_pre_hook(before_layer)
    os.fsync, os.replace = fsync, replace  # type: ignore[assignment]


def main() -> None:
    from tal_fast.training.command import main as train
    from tal_fast.utils.process import run_and_exit

    _, phase, _, extra = sys.argv[1].split(":")
    words = sys.argv[2:]
    if phase != "option":
        arm(sys.argv[1])
    elif os.environ.get("RANK") == "1":
        words.append(extra)
    run_and_exit(lambda: train(words))


if __name__ == "__main__":
    main()
