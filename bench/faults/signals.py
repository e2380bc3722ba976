"""Signals and errors: SIGTERM, SIGUSR1, SIGKILL in validation, an exception in a step, a loss that is not finite."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from bench.faults.runs import (
    STEPS_PER_EPOCH,
    Job,
    command,
    expect,
    last,
    leaves,
    options,
    resume_and_compare,
    steps_saved,
    train,
    wait_for,
)
from tal_fast.runs import checkpoint
from tal_fast.utils.signals import REQUEUE


def stop(
    folder: Path, number: signal.Signals, processes: int = 1, one_rank: bool = False, epochs: int = 20
) -> dict[str, Any]:
    """Send a shutdown signal to the process, to torchrun, or to one of its two ranks."""
    output = folder / "run"
    handled = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # by default all but the last
    with Job(folder, [*command(processes, ["tal_fast.train"], handled), *options(output, epochs)]) as job:
        wait_for("a checkpoint", last(output).exists)
        before = steps_saved(output)
        os.kill(job.ranks()[-1] if one_rank else job.process.pid, number)
        sent = time.time()
        done = job.end()
        ended = time.time() - sent
    expect(f"stopped by {number.name} and saved after" in done.stderr, "it is not said that the run is saved", done)
    written = last(output).stat().st_mtime - sent
    saved = steps_saved(output)
    # No step more where the signal comes between a checkpoint and the next step: the same step is saved again.
    expect(before <= saved < epochs * STEPS_PER_EPOCH, f"{before} steps were saved before and {saved} after", done)
    epoch, step = divmod(saved, STEPS_PER_EPOCH)
    expect(f"saved after {epoch} epochs and {step} steps" in done.stderr, f"it is said otherwise than {saved}", done)
    if processes == 1:
        expect(done.returncode == REQUEUE, f"exit code {done.returncode}, not {REQUEUE}", done)
    elif one_rank:
        expect(f"exitcode  : {REQUEUE}" in done.stderr, f"no rank left with {REQUEUE}", done)
    expect(written < 20, f"saved {written:.0f} s after the signal")
    resume_and_compare(folder, output, processes, epochs)
    return {"seconds until saved": round(written, 2), "seconds until ended": round(ended, 2)}


def in_validation(folder: Path, how: str, epochs: int = 4) -> dict[str, Any]:
    """Send SIGTERM (``term``) or SIGKILL (``job``) within the validation of the second epoch."""
    output, trained = folder / "run", 2 * STEPS_PER_EPOCH
    words = [*command(1, ["bench.fault_points", f"{how}:validation:{trained}:5"]), *options(output, epochs)]
    done = train(folder, words)
    code = REQUEUE if how == "term" else -signal.SIGKILL
    expect(done.returncode == code, f"it did not end with {code}", done)
    expect(steps_saved(output) == trained, f"{steps_saved(output)} steps were saved, not {trained}", done)
    resume_and_compare(folder, output, 1, epochs)
    return {}


def exception(folder: Path, epochs: int = 4) -> dict[str, Any]:
    """Raise an exception in the forward pass of a step."""
    output, step = folder / "run", STEPS_PER_EPOCH + 8
    done = train(folder, [*command(1, ["bench.fault_points", f"error:layer:{step}:5"]), *options(output, epochs)])
    expect(done.returncode == 1, "it did not end with 1", done)
    expect("RuntimeError: an error that nobody expected" in done.stderr, "there is no traceback", done)
    expect(steps_saved(output) == step, f"{steps_saved(output)} steps were saved, not {step}", done)
    resume_and_compare(folder, output, 1, epochs)
    return {"steps saved": step}


def not_finite(folder: Path, epochs: int = 4) -> dict[str, Any]:
    """Make a weight NaN after a step."""
    output, step = folder / "run", STEPS_PER_EPOCH + 4
    done = train(folder, [*command(1, ["bench.fault_points", f"nan:step:{step}:0"]), *options(output, epochs)])
    expect(done.returncode == 2 and "Traceback" not in done.stderr, "it is not refused in a sentence", done)
    expect("diverged" in done.stderr and "--allow optim.lr" in done.stderr, "the sentence names no remedy", done)
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        content = checkpoint.load(output / checkpoint.FOLDER / name)
        tensors = {key: value for key, value in leaves(content) if isinstance(value, torch.Tensor)}
        bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
        expect(not bad, f"{name} holds what is not finite: {bad[:3]}")
    saved, other = steps_saved(output), folder / "slower"
    shutil.copytree(output, other)
    words = options(other, epochs, "--resume", "auto", "--optim.lr", "0.05", "--allow", "optim.lr")
    done = train(folder, [*command(1, ["tal_fast.train"]), *words])
    expect(done.returncode == 0, "it does not go on with the smaller learning rate", done)
    resume_and_compare(folder, output, 1, epochs)
    return {"steps saved": saved}
