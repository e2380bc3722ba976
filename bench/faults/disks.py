"""Faults of disks and folders: damaged checkpoints, full and read-only disks, folders deleted or used twice."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench.faults.runs import (
    Impossible,
    Job,
    command,
    differences,
    expect,
    expect_same_end,
    last,
    options,
    read_table,
    resume_and_compare,
    steps_saved,
    train,
    undisturbed,
    wait_for,
)
from tal_fast.runs import checkpoint


def damaged(folder: Path, epochs: int = 3) -> dict[str, Any]:
    """Truncate, bit-flip, empty or delete the last checkpoint; then damage the previous one too."""
    trained = folder / "trained"
    done = train(folder, [*command(1, ["tal_fast.train"]), *options(trained, epochs)])
    expect(done.returncode == 0, "the run failed", done)
    for kind, damage in DAMAGES.items():
        output = folder / kind
        shutil.copytree(trained, output)
        damage(last(output))
        words = [*command(1, ["tal_fast.train"]), *options(output, epochs, "--resume", "auto")]
        done = train(folder, words)
        expect(done.returncode == 0, f"with its last checkpoint {kind} the run does not go on", done)
        expect("warning: " in done.stdout + done.stderr or kind == "lost", f"nothing is said of one {kind}", done)
        expect_same_end(undisturbed(folder, 1, epochs), output)
    for name in (checkpoint.LAST, checkpoint.PREVIOUS):
        (output / checkpoint.FOLDER / name).write_bytes(b"")
    before = read_table(output / "metrics.csv")
    done = train(folder, words)
    expect(done.returncode == 2 and done.stderr.count("\n") == 1, "no whole checkpoint is not refused clearly", done)
    expect(checkpoint.LAST in done.stderr and checkpoint.PREVIOUS in done.stderr, "the refusal names no file", done)
    expect(read_table(output / "metrics.csv") == before, "the refusal did not leave the run alone", done)
    return {"damages": ", ".join(DAMAGES)}


def flip(path: Path) -> None:
    """Flip a bit of the largest tensor, not of the zip file's padding, which nothing reads."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        entry = max(file.infolist(), key=lambda e: e.file_size)
    header = 30 + sum(struct.unpack_from("<HH", content, entry.header_offset + 26))  # with its name and extra field
    content[entry.header_offset + header + entry.file_size // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "bit-flipped": flip,
    "emptied": lambda path: os.truncate(path, 0),
    "lost": lambda path: path.unlink(),
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a file system of 8 MiB.

    Raises:
        Impossible: this user may not mount one.
    """
    disk = folder / "disk"
    disk.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        raise Impossible("mounting a small file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk with one file."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    return ballast


def full_disk(folder: Path, epochs: int = 12) -> dict[str, Any]:
    """Fill the output disk during training, permanently and for a while."""
    with small_disk(folder) as disk:
        for_good, for_a_while = disk / "for-good", disk / "for-a-while"
        with Job(folder, [*command(1, ["tal_fast.train"]), *options(for_good, epochs)]) as job:
            wait_for("a checkpoint", last(for_good).exists)
            ballast = fill(disk)
            done = job.end()
        expect(done.returncode == 2, "a run whose end is not saved does not end with 2", done)
        expect("Traceback" not in done.stderr and "No space left" in done.stderr, "it is not said clearly", done)
        saved = steps_saved(for_good)
        expect(saved > 0, "no whole checkpoint is left", done)
        ballast.unlink()
        resume_and_compare(folder, for_good, 1, epochs)
        shutil.rmtree(for_good)

        with Job(folder, [*command(1, ["tal_fast.train"]), *options(for_a_while, epochs)]) as job:
            wait_for("a checkpoint", last(for_a_while).exists)
            ballast = fill(disk)
            wait_for("the warning", lambda: "No space left" in job.err + job.out or job.process.poll() is not None)
            ballast.unlink()
            done = job.end()
        expect(done.returncode == 0, "the run does not outlive a disk that is full for a while", done)
        expect_same_end(undisturbed(folder, 1, epochs), for_a_while)
    return {"steps in the last whole checkpoint": saved}


def expect_refusal(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Check for exit code 2 after one sentence with these words."""
    expect(done.returncode == 2 and done.stderr.count("\n") == 1, "it is not refused in a sentence", done)
    missing = [word for word in words if word not in done.stderr]
    expect(not missing, f"the sentence does not name {missing}", done)


def damaged_best(folder: Path, epochs: int = 3) -> dict[str, Any]:
    """Truncate best.pt."""
    output = folder / "run"
    done = train(folder, [*command(1, ["tal_fast.train"]), *options(output, epochs)])
    expect(done.returncode == 0, "the run failed", done)
    best = output / checkpoint.FOLDER / checkpoint.BEST
    os.truncate(best, best.stat().st_size // 2)
    words = [sys.executable, "-m", "tal_fast.evaluate", "--run", str(output), "--no-typicalness", "--bootstrap", "0"]
    expect_refusal(train(folder, words), str(best))
    done = train(folder, [*words, "--checkpoint", "last"])
    expect(done.returncode == 0, "the last checkpoint was damaged too", done)
    return {}


def full_at_start(folder: Path, epochs: int = 2) -> dict[str, Any]:
    """Start on a full disk."""
    with small_disk(folder) as disk:
        ballast, output = fill(disk), disk / "run"
        words = [*command(1, ["tal_fast.train"]), *options(output, epochs)]
        expect_refusal(train(folder, words), str(disk), "No space left")
        ballast.unlink()
        done = train(folder, words)
        expect(done.returncode == 0, "with room it does not start", done)
        expect_same_end(undisturbed(folder, 1, epochs), output)
    return {}


def read_only(folder: Path, epochs: int = 2) -> dict[str, Any]:
    """Start on a read-only disk, and below a file."""
    (folder / "file").parent.mkdir(parents=True, exist_ok=True)
    (folder / "file").touch()
    below = train(folder, [*command(1, ["tal_fast.train"]), *options(folder / "file" / "run", epochs)])
    expect_refusal(below, str(folder / "file"))
    with small_disk(folder) as disk:
        words = [*command(1, ["tal_fast.train"]), *options(disk / "run", epochs)]
        remount = ["mount", "-o", "remount,{}", str(disk)]
        subprocess.run([word.format("ro") for word in remount], check=True)
        expect_refusal(train(folder, words), str(disk))
        subprocess.run([word.format("rw") for word in remount], check=True)
        done = train(folder, words)
        expect(done.returncode == 0, "on the writable disk it does not start", done)
        expect_same_end(undisturbed(folder, 1, epochs), disk / "run")
    return {}


def deleted_folder(folder: Path, epochs: int = 12) -> dict[str, Any]:
    """Delete the output folder during training."""
    output = folder / "run"
    with Job(folder, [*command(1, ["tal_fast.train"]), *options(output, epochs)]) as job:
        wait_for("a checkpoint", last(output).exists)
        output.rename(folder / "deleted")
        shutil.rmtree(folder / "deleted", ignore_errors=True)
        done = job.end()
    expect(done.returncode == 0, "the run does not outlive it", done)
    expect((output / "config.yaml").exists(), "config.yaml is not written again", done)
    found = differences(undisturbed(folder, 1, epochs), output, [checkpoint.LAST])
    expect(not found, f"it did not end as the undisturbed run: {found}")
    return {}


def two_runs(folder: Path, epochs: int = 200) -> dict[str, Any]:
    """Start a second run on the folder of a running one."""
    output = folder / "run"
    words = [*command(1, ["tal_fast.train"]), *options(output, epochs, "--resume", "auto")]
    with Job(folder, words) as first:
        wait_for("a checkpoint", last(output).exists)
        second = train(folder, words)
        expect(first.process.poll() is None, "the first run has ended")
        expect_refusal(second, str(first.process.pid), str(output))
        first.process.send_signal(signal.SIGTERM)
        expect(first.end().returncode == 75, "the first run was disturbed", first.end())
    shutil.rmtree(output)
    return {}


def two_evaluations(folder: Path) -> dict[str, Any]:
    """Evaluate two runs at the same time with one cache."""
    import json

    runs = [folder / f"run{seed}" for seed in (0, 1)]
    for seed, run in enumerate(runs):
        done = train(folder, [*command(1, ["tal_fast.train"]), *options(run, 2, "--seed", str(seed))])
        expect(done.returncode == 0, "training failed", done)

    def words(run: Path, cache: str, output: str) -> list[str]:
        more = f"--no-typicalness --bootstrap 0 --cache {folder / cache} --output {run / output} --batch-size 16"
        return [sys.executable, "-m", "tal_fast.evaluate", "--run", str(run), *more.split()]

    for run in runs:
        done = train(folder, words(run, f"cache-{run.name}", "alone"))
        expect(done.returncode == 0, "evaluation failed", done)
    with (
        Job(folder, words(runs[0], "cache", "together")) as first,
        Job(folder, words(runs[1], "cache", "together")) as other,
    ):
        for job in (first, other):
            done = job.end()
            expect(done.returncode == 0, "evaluation failed beside another", done)
    reports = [[json.loads((run / name / "report.json").read_text()) for name in ("alone", "together")] for run in runs]
    for alone, together in reports:
        same = all(alone[name] == together[name] for name in ("weights_sha256", "id_accuracy", "calibration"))
        expect(same, "an evaluation reported other numbers than alone")
    expect(reports[0][0]["id_accuracy"] != reports[1][0]["id_accuracy"], "the two runs cannot be told apart")
    return {}
