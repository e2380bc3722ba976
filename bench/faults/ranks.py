"""Faults of several processes: ranks that are lost, hang or differ, a launcher that is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from bench.faults.runs import (
    STEPS_PER_EPOCH,
    Job,
    alive,
    command,
    expect,
    expect_same_end,
    last,
    options,
    resume_and_compare,
    steps_saved,
    train,
    undisturbed,
    wait_for,
)


def lost_rank(folder: Path, epochs: int = 6) -> dict[str, Any]:
    """Kill one of two ranks; torchrun restarts both."""
    output = folder / "run"
    module = ["bench.fault_points", f"rank1:step:{2 * STEPS_PER_EPOCH + 5}:0.01"]
    words = [*command(2, module, "--max-restarts=1"), *options(output, epochs, "--resume", "auto")]
    with Job(folder, words) as job:
        ranks = wait_for("two ranks", lambda: found if len(found := job.ranks()) == 2 else None)
        wait_for("the loss of a rank", lambda: not all(map(alive, ranks)))
        lost = time.monotonic()
        wait_for("the restart", lambda: "resuming from" in job.out)
        restarted = time.monotonic() - lost
        done = job.end()
    expect(done.returncode == 0, "the job did not go on", done)
    expect_same_end(undisturbed(folder, 2, epochs), output)
    return {"seconds from the loss to the resumed run": round(restarted, 1)}


def lost_launcher(folder: Path, epochs: int = 20) -> dict[str, Any]:
    """Kill torchrun itself."""
    output = folder / "run"
    with Job(folder, [*command(2, ["tal_fast.train"]), *options(output, epochs)]) as job:
        wait_for("a checkpoint", last(output).exists)
        ranks = job.ranks()
        job.process.kill()
        killed = time.time()
        wait_for("the ranks to end", lambda: not any(map(alive, ranks)))
        ended = time.time() - killed
        said = job.err
    saved = steps_saved(output)
    expect(saved < epochs * STEPS_PER_EPOCH, "the ranks trained to the end without their launcher")
    expect("saved after" in said, f"the ranks did not save: {said[-2000:]}")
    written = last(output).stat().st_mtime - killed
    with Job(folder, [*command(2, ["tal_fast.train"]), *options(folder / "early", epochs)]) as job:
        ranks = wait_for("two ranks", lambda: len(job.ranks()) == 2 and job.ranks())
        time.sleep(1.0)  # for Python to start, but not PyTorch
        job.process.kill()
        wait_for("the ranks to end before training", lambda: not any(map(alive, ranks)), timeout=30)
    resume_and_compare(folder, output, 2, epochs)
    return {"seconds until saved": round(written, 2), "seconds until ended": round(ended, 2)}


def hung_rank(folder: Path, epochs: int = 16, timeout: int = 5) -> dict[str, Any]:
    """Stop one of two ranks (SIGSTOP) under ``--max-restarts=1``."""
    output = folder / "run"
    words = options(output, epochs, "--resume", "auto", "--rank-timeout", str(timeout))
    with Job(folder, [*command(2, ["tal_fast.train"], "--max-restarts=1"), *words]) as job:
        wait_for("a checkpoint", last(output).exists)
        os.kill(job.ranks()[1], signal.SIGSTOP)
        stopped = time.monotonic()
        wait_for("the sentence", lambda: "rank 1 did not answer" in job.err)
        named = time.monotonic() - stopped
        wait_for("the restart", lambda: "resuming from" in job.out)
        restarted = time.monotonic() - stopped
        done = job.end()
    expect(done.returncode == 0, "the job did not go on", done)
    expect(
        f"within {timeout} s" in done.stderr and "Traceback (most" not in done.stderr, "it is not said clearly", done
    )
    expect_same_end(undisturbed(folder, 2, epochs, "--rank-timeout", str(timeout)), output)
    figures = {"named": named, "training again": restarted}
    return {f"seconds until {name}": round(seconds, 1) for name, seconds in figures.items()}


def unequal_ranks(folder: Path, epochs: int = 2) -> dict[str, Any]:
    """Give one of two ranks other options."""
    for option, sentence in (
        ("--seed=5", "seed is 5, not 0"),
        ("--checkpoint-every-steps=7", "every_steps is 7, not 5"),
    ):
        output = folder / "run"
        words = [*command(2, ["bench.fault_points", f"rank1:option:0:{option}"]), *options(output, epochs)]
        done = train(folder, words, timeout=120)
        said = f"rank 1 differs from rank 0 ({'checkpoint_' if 'every' in sentence else ''}{sentence})"
        expect(done.stderr.count(said) == 2, f"{option} on one rank is not refused on both", done)
        expect(done.stderr.count("exitcode  : 2") == 2, "the ranks did not end with exit code 2", done)
        expect(not output.exists(), "the refused run left a folder", done)
    return {}
