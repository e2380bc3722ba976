"""SIGKILL at random points of a run: within steps, in validation, and at each phase of writing a file.

The configurations cover the methods, the average of the weights, accumulation, bfloat16, unreadable files, both
loaders with and without workers, images in memory, in files and in shards, and one, two and four processes.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.fault_points import PHASES
from bench.faults.runs import (
    STEPS_PER_EPOCH,
    Failed,
    Impossible,
    command,
    expect,
    options,
    resume_and_compare,
    say,
    steps_saved,
    train,
    undisturbed,
)
from bench.harness import environment, write_json
from tal_fast.data.pack import pack

EPOCHS = 6

SAME = "as the undisturbed run, bit for bit"
"""Result of a configuration that was killed."""


@dataclass(frozen=True)
class Configuration:
    """Run that is killed.

    Attributes:
        words: options beside those of ``options``; ``{data}`` is a folder that ``data`` fills.
        processes: number of processes.
        data: makes the images, with 14 steps to an epoch.
        needs: package without which it cannot run.
    """

    words: str = ""
    processes: int = 1
    data: Callable[[Path], None] | None = None
    needs: str | None = None


def image_folder(folder: Path) -> None:
    """224 training and 48 validation images of noise in two classes; one file of each class does not decode."""
    random_state = np.random.default_rng(0)
    for split, count in (("train", 112), ("val", 24)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = random_state.integers(0, 256, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    for victim in (folder / "train" / "b" / "7.jpg", folder / "val" / "a" / "7.jpg"):
        content = victim.read_bytes()
        victim.write_bytes(content[:-200])


def shards(folder: Path) -> None:
    """The images of ``image_folder`` in several shards."""
    image_folder(folder.with_name("images"))
    pack(folder.with_name("images"), folder, shard_mb=0.03)


def cifar(folder: Path) -> None:
    """Binary files of CIFAR-10's layout with 896 training and 128 validation images."""
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    for number, (name, count) in enumerate(
        zip([*names, "test_batch.bin"], [180, 180, 180, 180, 176, 128], strict=True)
    ):
        records = np.random.default_rng(number).integers(0, 256, (count, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        (folder / name).write_bytes(records.tobytes())
    (folder / "batches.meta.txt").write_text("".join(f"class{i}\n" for i in range(10)))


_FOLDER = (
    "--data.dataset folder --data.root {data} --data.channels 3 --data.mean null --data.std null --batch-size 16 "
    "--eval-batch-size 16 --data.crop-fraction 0.875"
)
_CIFAR = (
    "--data.dataset cifar10 --data.root {data} --data.channels 3 --data.mean null --data.std null "
    "--data.crop-area null --data.shift 4 --data.image-size 32 --model.width 4"
)

CONFIGURATIONS: dict[str, Configuration] = {
    "tal": Configuration(),
    "ce, average of weights": Configuration(
        "--method.name ce --optim.ema-decay 0.9 --optim.name adamw --optim.lr 0.003"
    ),
    "tal, accumulation, clipping": Configuration("--optim.accumulate 2 --optim.clip-norm 1 --keep-every-epochs 2"),
    "tal, bfloat16": Configuration("--precision bfloat16"),
    "fmfp": Configuration("--method.name fmfp --method.options.swa-from 0.4"),
    "fmfp-tal, 2 workers": Configuration("--method.name fmfp-tal --method.options.swa-from 0.4 --data.workers 2"),
    "crl, images in memory": Configuration("--method.name crl " + _CIFAR, data=cifar),
    "tal, DALI, folder": Configuration(
        _FOLDER + " --data.loader dali --data.workers 2", 1, image_folder, "nvidia.dali"
    ),
    "tal, folder, unreadable files, 1 worker": Configuration(_FOLDER + " --data.workers 1", data=image_folder),
    "tal, shards, unreadable images, 1 worker": Configuration(
        _FOLDER.replace("folder", "webdataset") + " --data.workers 1", data=shards
    ),
    "tal, 2 processes": Configuration("", 2),
    "ce, average, accumulation, 2 processes": Configuration(
        "--method.name ce --optim.ema-decay 0.9 --optim.accumulate 2", 2
    ),
    "tal, shared queue, 4 processes": Configuration("--method.options.queue-scope global", 4),
}


def kills(
    folder: Path,
    count: int = 20,
    processes: int = 1,
    epochs: int = EPOCHS,
    seed: int | None = None,
    words: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Kill a run at ``count`` random points (further runs if it ends before), resuming it each time.

    It must end as an undisturbed run: every column but timings, and every tensor of the checkpoints, bit for bit.
    """
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    draw = random.Random(seed)
    phases, again, runs = dict.fromkeys(("step", "validation", *PHASES), 0), 0, 0
    undisturbed(folder, processes, epochs, *words)
    while (killed := sum(phases.values())) < count:
        runs += 1
        expect(runs < 10 + count, "the points never come")
        output = folder / f"killed{runs}"
        shutil.rmtree(output, ignore_errors=True)
        arguments = options(output, epochs, *words, "--resume", "auto")
        for point in sorted(draw.randrange(1, (epochs - 1) * STEPS_PER_EPOCH) for _ in range(count - killed)):
            phase = draw.choice(("step", "step", "validation", *PHASES))
            extra = f"{draw.uniform(0, 0.03):.4f}" if phase == "step" else str(draw.randrange(4))
            before = steps_saved(output)
            spec = f"job:{phase}:{max(1, point - before)}:{extra}"
            done = train(folder, [*command(processes, ["bench.fault_points", spec]), *arguments])
            if done.returncode == 0:  # it was over before the point came
                break
            expect(done.returncode == -signal.SIGKILL, f"{spec} ended the run otherwise than by SIGKILL", done)
            say(f"{output}: killed at {spec} after {before} steps, {steps_saved(output)} are saved")
            phases[phase] += 1
            again += max(0, point - steps_saved(output))
        resume_and_compare(folder, output, processes, epochs, *words)
        shutil.rmtree(output)
    return {
        "kills": phases,
        "runs": runs,
        "steps": epochs * STEPS_PER_EPOCH,
        "steps lost a kill": again / count,
        "seed": seed,
    }


def kill_configuration(work: Path, name: str, count: int, seed: int | None = None) -> dict[str, Any]:
    """Kill one of ``CONFIGURATIONS``."""
    configuration = CONFIGURATIONS[name]
    if configuration.needs is not None and find_spec(configuration.needs) is None:
        raise Impossible(f"{configuration.needs} is not installed")
    data = work / "data"
    if configuration.data is not None and not data.exists():
        configuration.data(data)
    words = tuple(configuration.words.format(data=data).split())
    return kills(work / "runs", count, configuration.processes, EPOCHS, seed, words)


def kill_all(work: Path, count: int, out: Path | None, jobs: int, seed: int | None = None) -> bool:
    """Share ``count`` kills among ``CONFIGURATIONS``, ``jobs`` at a time; returns whether all ended as undisturbed.

    With ``out``, configurations that this file has as ended well are not repeated, and each is added when it ends.
    """
    result: dict[str, Any] = {"what": "SIGKILL at random points, by configuration", "environment": environment()}
    before = json.loads(out.read_text())["results"] if out is not None and out.exists() else []
    ended = {entry["configuration"]: entry for entry in before if entry["result"] == SAME}
    lock = threading.Lock()
    shares = {name: count // len(CONFIGURATIONS) for name in CONFIGURATIONS}
    for name in list(shares)[: count % len(CONFIGURATIONS)]:
        shares[name] += 1

    def one(name: str) -> None:
        if name in ended or not shares[name]:
            return
        began = time.monotonic()
        processes = CONFIGURATIONS[name].processes
        entry: dict[str, Any] = {"configuration": name, "processes": processes, "asked": shares[name]}
        folder = work / f"configuration-{list(CONFIGURATIONS).index(name)}"
        try:
            entry |= kill_configuration(folder, name, shares[name], seed)
            entry["result"] = SAME
            shutil.rmtree(folder)
        except Impossible as reason:
            entry["result"] = f"not tried: {reason}"
        except (Failed, subprocess.TimeoutExpired) as error:
            entry["result"] = f"FAILED: {error}"
        entry |= {"seconds": round(time.monotonic() - began), "commit": result["environment"]["commit"]}
        with lock:
            ended[name] = entry
            say(f"{name}: {shares[name]} kills in {entry['seconds']} s, {entry['result']}")
            result["results"] = [ended[known] for known in CONFIGURATIONS if known in ended]
            result["kills"] = sum(sum(e.get("kills", {}).values()) for e in result["results"])
            if out is not None:
                write_json(out, result)

    order = sorted(CONFIGURATIONS, key=lambda name: -CONFIGURATIONS[name].processes)  # the longest first
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, order))
    return not any(entry["result"].startswith("FAILED") for entry in ended.values())
