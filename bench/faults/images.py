"""Faults of images and their loaders."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from PIL import Image

from bench.faults.runs import Job, command, expect, expect_same_end, last, read_table, train, wait_for


def make_images(folder: Path, count: int) -> None:
    """Write ``count`` images of noise for each of two classes in ``train`` and ``val``."""
    for path in (
        folder / split / name / f"{i}.jpg" for split in ("train", "val") for name in "ab" for i in range(count)
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((48, 48), 60).convert("RGB").save(path)


def corrupt_image(folder: Path, loader: str = "torch", epochs: int = 30) -> dict[str, Any]:
    """Truncate an image file during training."""
    images, output = folder / "images", folder / "run"
    make_images(images, 32)
    words = (
        f"--config folder-tal --data.root {images} --data.loader {loader} --data.workers 0 --data.image-size 32 "
        f"--model.name cifar_resnet8 --model.width 4 --batch-size 16 --epochs {epochs} --device cpu --threads 1 "
        "--logger none"
    ).split()
    words = [*command(1, ["tal_fast.train"]), *words, "--resume", "auto", "--output"]
    straight, victim = folder / "straight", images / "train" / "a" / "7.jpg"
    done = train(folder, [*words, str(straight)])
    expect(done.returncode == 0, "the undisturbed run failed", done)
    whole, times = victim.read_bytes(), (victim.stat().st_atime_ns, victim.stat().st_mtime_ns)

    def mend() -> None:
        victim.write_bytes(whole)
        os.utime(victim, ns=times)  # a checkpoint knows when the images last changed

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        mend()
        with Job(folder, [*words, str(output), *more]) as job:
            wait_for("a checkpoint", last(output).exists)
            victim.write_bytes(whole[: len(whole) // 2])
            return job.end()

    done = run()
    expect(done.returncode == 0, "the run does not outlive it", done)
    told = f"{victim} cannot be decoded"
    expect(told in done.stderr and "training goes on without it" in done.stderr, "the file is not named", done)
    expect(read_table(output / "metrics.csv")[-1]["unreadable"] == "1", "the file is not counted", done)
    shutil.rmtree(output)

    done = run("--data.max_unreadable", "0")
    expect(done.returncode == 2 and told in done.stderr, "with none allowed it is not refused clearly", done)
    expect("saved after" in done.stderr and "Traceback" not in done.stderr, "nothing is said of what is saved", done)
    mend()
    done = train(folder, [*words, str(output)])
    expect(done.returncode == 0, "with the file mended it does not go on", done)
    expect_same_end(straight, output)
    return {}


def stopped_worker(folder: Path, timeout: int = 5) -> dict[str, Any]:
    """Stop a worker process of the torch loader (SIGSTOP)."""
    images, output = folder / "images", folder / "run"
    make_images(images, 64)
    words = (
        f"--config folder-tal --data.root {images} --data.loader torch --data.workers 1 --data.timeout {timeout} "
        f"--data.image-size 32 --model.name cifar_resnet8 --model.width 4 --batch-size 16 --epochs 200 --device cpu "
        f"--threads 1 --logger none --output {output}"
    ).split()
    with Job(folder, [*command(1, ["tal_fast.train"]), *words]) as job:
        wait_for("a checkpoint", last(output).exists)
        workers = wait_for("a worker", job.ranks)
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        stopped = time.monotonic()
        done = job.end(timeout + 60)
    expect(done.returncode == 2 and "Traceback" not in done.stderr, "it does not end in a sentence", done)
    expect(f"{timeout} s" in done.stderr and "saved after" in done.stderr, "limit or saving is not said", done)
    return {"seconds until ended": round(time.monotonic() - stopped, 1)}
