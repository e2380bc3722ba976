"""Fault tolerance of training: ``python -m bench.faults [FAULT ...]``; all faults without a name.

Each fault is injected into real runs on digits on the CPU, and its outcome is checked and measured. ``kills`` kills
one run with SIGKILL at ``--kills`` random points (within steps, and at each phase of writing a file) and resumes it
each time; it must end like an undisturbed run: every number but the timings, and every tensor of the checkpoints, bit
for bit. ``--processes 2`` does so under torchrun. docs/reliability.md lists the outcomes.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.fault_points import PHASES, children
from bench.harness import environment, write_json
from tal_fast.runs import checkpoint
from tal_fast.utils.signals import REQUEUE

ROOT = Path(__file__).parents[1]
STEPS_PER_EPOCH = 14
"""Steps of an epoch: 901 training images in batches of 64."""

TIMINGS = {"seconds", "images_per_s", "data_wait"}
"""Entries of metrics that differ between equal runs."""

PATHS = {"output", "resume"}
"""Entries of the configuration that may differ between runs that must end equally."""


class Failed(Exception):
    """A run behaved otherwise than docs/reliability.md says."""


class Impossible(Exception):
    """A fault cannot be injected on this machine."""


@dataclass
class Outcome:
    """Outcome of one fault.

    Attributes:
        fault: its name.
        result: what happened, as a sentence.
        measured: figures.
    """

    fault: str
    result: str
    measured: dict[str, Any] = field(default_factory=dict)


def options(output: Path, epochs: int, *more: str) -> list[str]:
    """Command-line options of a small run on digits with random crops, shuffling and queues."""
    words = (
        f"--config digits-tal --epochs {epochs} --checkpoint-every-steps 5 --data.loader torch --data.workers 0 "
        f"--device cpu --logger none --output {output}"
    )
    return [*words.split(), *more]


def command(processes: int, module: Sequence[str], *launcher: str) -> list[str]:
    """Command that runs a module, under torchrun for more than one process."""
    if processes == 1:
        return [sys.executable, "-m", *module]
    return [*torchrun("--standalone", f"--nproc-per-node={processes}", *launcher), "-m", *module]


def torchrun(*launcher: str) -> list[str]:
    """Command of torchrun under the current Python."""
    return [sys.executable, "-m", "torch.distributed.run", *launcher]


def surroundings(folder: Path) -> dict[str, str]:
    """Environment variables of a run: one thread, images cached beside ``folder``, this checkout."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "TAL_FAST_CACHE": str(folder.parent / "cache"), "PYTHONPATH": path}


class Job:
    """Background process; it and its children are killed at the end of the ``with`` block.

    Args:
        folder: where it runs; what it says goes to files there.
        words: the command.
    """

    def __init__(self, folder: Path, words: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.words = list(words)
        self._out, self._err = (Path(tempfile.mkstemp(dir=folder, suffix=suffix)[1]) for suffix in (".out", ".err"))
        self._ranks: list[int] = []
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                self.words, env=surroundings(folder), cwd=folder, stdout=out, stderr=err, start_new_session=True
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [self.process.pid, *self.ranks()] if self.process.poll() is None else self._ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def ranks(self) -> list[int]:
        """Process numbers of the launcher's children."""
        self._ranks = children(self.process.pid)
        return self._ranks

    def end(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for the end and return the completed process."""
        self.process.wait(timeout)
        return subprocess.CompletedProcess(self.words, self.process.returncode, self.out, self.err)


def train(folder: Path, words: Sequence[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a command until it ends, with any exit code."""
    with Job(folder, words) as job:
        return job.end(timeout)


def undisturbed(folder: Path, processes: int, epochs: int) -> Path:
    """Output folder of an undisturbed run to compare with; trained once."""
    output = folder.parent / f"undisturbed-{processes}-{epochs}"
    if not output.exists():
        done = train(folder, [*command(processes, ["tal_fast.train"]), *options(output, epochs)])
        expect(done.returncode == 0, "the undisturbed run failed", done)
    return output


def resume_and_compare(folder: Path, output: Path, processes: int, epochs: int) -> None:
    """Resume a run and check that it ends like an undisturbed one."""
    words = options(output, epochs, "--resume", "auto")
    done = train(folder, [*command(processes, ["tal_fast.train"]), *words])
    expect(done.returncode == 0, f"{output} does not go on", done)
    expect_same_end(undisturbed(folder, processes, epochs), output)


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 120) -> Any:
    """Poll ``condition`` and return its first true value."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise Failed(f"waited {timeout:.0f} s for {what}")
        time.sleep(0.005)
    return value


def alive(pid: int) -> bool:
    """Whether a process is running (zombies are not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def last(output: Path) -> Path:
    return output / checkpoint.FOLDER / checkpoint.LAST


def steps_saved(output: Path) -> int:
    """Number of optimizer steps in the newest intact checkpoint."""
    folder = output / checkpoint.FOLDER
    if not checkpoint.exists(folder):
        return 0
    content, _, _ = checkpoint.load_newest(folder)
    return content["epoch"] * STEPS_PER_EPOCH + content["step"]


def expect(condition: bool, what: str, done: subprocess.CompletedProcess[str] | None = None) -> None:
    if not condition:
        tail = f"\n--- exit code {done.returncode}, its last words:\n{done.stderr[-3000:]}" if done else ""
        raise Failed(what + tail)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every entry of a checkpoint but timings and paths."""
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        yield name, value
        return
    for key, inner in pairs:
        if key not in TIMINGS and not (name == ".config" and key in PATHS):
            yield from leaves(inner, f"{name}.{key}")


def differences(one: Path, other: Path) -> list[str]:
    """Differences between two finished runs: entries of the last and best checkpoint, metrics.csv."""
    found = []
    for name in (checkpoint.LAST, checkpoint.BEST):
        mine, yours = (dict(leaves(checkpoint.load(run / checkpoint.FOLDER / name))) for run in (one, other))
        for key in sorted(mine.keys() | yours.keys()):
            a, b = mine.get(key), yours.get(key)
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
            if not same:
                found.append(name + key)
    tables = [read_table(run / "metrics.csv") for run in (one, other)]
    if tables[0] != tables[1]:
        found.append("metrics.csv")
    return found


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the timings."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMINGS} for row in csv.DictReader(file)]


def expect_same_end(one: Path, other: Path) -> None:
    found = differences(one, other)
    expect(not found, f"{other} did not end as {one}: {', '.join(found[:8])} differ")
    left = [path for path in other.rglob(".*") if path.is_file()]
    expect(not left, f"temporary files were left behind: {', '.join(map(str, left))}")


def kills(folder: Path, count: int = 20, processes: int = 1, epochs: int = 6, seed: int | None = None) -> Outcome:
    """Kill a run with SIGKILL at ``count`` random points (further runs if it ends before)."""
    seed = random.SystemRandom().randrange(2**31) if seed is None else seed
    draw = random.Random(seed)
    phases, again, runs = dict.fromkeys(("step", *PHASES), 0), 0, 0
    while (killed := sum(phases.values())) < count:
        runs += 1
        output = folder / f"killed{runs}"
        words = options(output, epochs, "--resume", "auto")
        for point in sorted(draw.randrange(1, (epochs - 1) * STEPS_PER_EPOCH) for _ in range(count - killed)):
            phase = draw.choice(("step", "step", *PHASES))  # a third within steps
            extra = f"{draw.uniform(0, 0.03):.4f}" if phase == "step" else str(draw.randrange(4))
            spec = f"job:{phase}:{max(1, point - steps_saved(output))}:{extra}"
            done = train(folder, [*command(processes, ["bench.fault_points", spec]), *words])
            if done.returncode == 0:  # it was over before the point came
                break
            expect(done.returncode == -signal.SIGKILL, f"{spec} ended the run otherwise than by SIGKILL", done)
            phases[phase] += 1
            again += max(0, point - steps_saved(output))
        resume_and_compare(folder, output, processes, epochs)
    return Outcome(
        "kills" if processes == 1 else f"kills ({processes} processes)",
        f"killed {count} times and resumed, it ended as the undisturbed run, bit for bit",
        {"kills": phases, "runs": runs, "steps": epochs * STEPS_PER_EPOCH, "lost": again / count, "seed": seed},
    )


def damaged(folder: Path, epochs: int = 3) -> Outcome:
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
    return Outcome(
        "damaged",
        "the one before is taken, which is said, and the run ends as the undisturbed one, bit for bit; with none whole "
        "it is refused (exit code 2) and nothing is touched",
        {"damages": ", ".join(DAMAGES)},
    )


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
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
    disk.mkdir(parents=True)
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


def full_disk(folder: Path, epochs: int = 12) -> Outcome:
    """Fill the output disk during training, permanently and for a while."""
    with small_disk(folder) as disk:
        for_good, for_a_while = disk / "for-good", disk / "for-a-while"
        with Job(folder, [*command(1, ["tal_fast.train"]), *options(for_good, epochs)]) as job:
            wait_for("a checkpoint", last(for_good).exists)
            ballast = fill(disk)
            done = job.end()
        expect(done.returncode not in (0, -signal.SIGKILL), "a run whose end is not saved says it is well", done)
        expect("Traceback" not in done.stderr and "No space left" in done.stderr, "it is not said clearly", done)
        code, saved = done.returncode, steps_saved(for_good)
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
    return Outcome(
        "full-disk",
        "it is said in a sentence and training goes on; with space again by the next checkpoint the run ends well, "
        f"else with exit code {code}, its last whole checkpoint loadable",
        {"steps in the last whole checkpoint": saved},
    )


def corrupt_image(folder: Path, loader: str = "torch", epochs: int = 30) -> Outcome:
    """Truncate an image file during training."""
    images, output = folder / "images", folder / "run"
    for path in (images / split / name / f"{i}.jpg" for split in ("train", "val") for name in "ab" for i in range(32)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((48, 48), 60).convert("RGB").save(path)
    words = (
        f"--config folder-tal --data.root {images} --data.loader {loader} --data.workers 0 --data.image-size 32 "
        f"--model.name cifar_resnet8 --model.width 4 --batch-size 16 --epochs {epochs} --device cpu --threads 1 "
        "--logger none"
    ).split()
    words = [*command(1, ["tal_fast.train"]), *words, "--resume", "auto", "--output"]
    straight, victim = folder / "straight", images / "train" / "a" / "7.jpg"
    done = train(folder, [*words, str(straight)])
    expect(done.returncode == 0, "the undisturbed run failed", done)
    whole = victim.read_bytes()

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        victim.write_bytes(whole)
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
    victim.write_bytes(whole)
    done = train(folder, [*words, str(output)])
    expect(done.returncode == 0, "with the file mended it does not go on", done)
    expect_same_end(straight, output)
    return Outcome(
        f"corrupt-image ({loader})",
        "the file is named once, counted in metrics.csv, and training goes on without it; with --data.max_unreadable 0 "
        "the steps before it are saved and the run ends with exit code 2; with the file mended that one goes on and "
        "ends as the undisturbed run, bit for bit",
    )


def lost_rank(folder: Path, epochs: int = 6) -> Outcome:
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
    return Outcome(
        "lost-rank",
        "torchrun ends the other rank and starts both again; they go on from the last checkpoint and end as the "
        "undisturbed run, bit for bit",
        {"seconds from the loss to the resumed run": round(restarted, 1)},
    )


def lost_launcher(folder: Path, epochs: int = 20) -> Outcome:
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
    resume_and_compare(folder, output, 2, epochs)
    return Outcome(
        "lost-launcher",
        "the ranks notice, save within the step and end; the resumed run ends as the undisturbed one, bit for bit",
        {"seconds until saved": round(written, 2), "seconds until ended": round(ended, 2)},
    )


def stop(folder: Path, number: signal.Signals, processes: int = 1, one_rank: bool = False, epochs: int = 20) -> Outcome:
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
        exits = f"exit code {REQUEUE}"
    elif one_rank:
        expect(f"exitcode  : {REQUEUE}" in done.stderr, f"no rank left with {REQUEUE}", done)
        exits = f"the ranks end with {REQUEUE}, torchrun with {done.returncode}"
    else:
        exits = f"torchrun ends with {done.returncode}"
    expect(written < 20, f"saved {written:.0f} s after the signal")
    resume_and_compare(folder, output, processes, epochs)
    to = "the process" if processes == 1 else "one of two ranks" if one_rank else "torchrun with two ranks"
    return Outcome(
        f"{number.name} to {to}",
        f"saved within the step, {exits}; the resumed run ends as the undisturbed one, bit for bit",
        {"seconds until saved": round(written, 2), "seconds until ended": round(ended, 2)},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(FAULTS)}; all if none is named")
    parser.add_argument("--kills", type=int, default=20, help="how many, for the fault of that name")
    parser.add_argument("--processes", type=int, default=1, help="of the run that is killed")
    parser.add_argument("--seed", type=int, help="of the points of the kills; another each time if not given")
    parser.add_argument("--out", type=Path, help="write the outcomes here as JSON")
    args = parser.parse_args()
    unknown = [name for name in args.faults if name not in FAULTS]
    if unknown:
        parser.error(f"no fault {unknown[0]!r}; there are {', '.join(FAULTS)}")
    result: dict[str, Any] = {"what": "faults in training", "environment": environment(), "results": []}
    failed = []
    work = Path(tempfile.mkdtemp(prefix="tal-fast-faults-"))
    for name in args.faults or FAULTS:
        given = {"count": args.kills, "processes": args.processes, "seed": args.seed} if name == "kills" else {}
        try:
            outcome = FAULTS[name](work / name, **given)
        except Impossible as reason:
            print(f"{name}: not tried: {reason}", flush=True)
            continue
        except (Failed, subprocess.TimeoutExpired) as error:
            failed.append(name)
            print(f"{name}: FAILED: {error}", flush=True)
            continue
        figures = ", ".join(f"{key}: {value}" for key, value in outcome.measured.items())
        print(f"{outcome.fault}: {outcome.result}" + (f" ({figures})" if figures else ""), flush=True)
        result["results"].append(asdict(outcome))
    if not failed:
        shutil.rmtree(work)
    if args.out:
        write_json(args.out, result)
    if failed:
        raise SystemExit(f"not as stated: {', '.join(failed)}; their files are in {work}")


FAULTS: dict[str, Callable[..., Outcome]] = {
    "kills": kills,
    "damaged": damaged,
    "full-disk": full_disk,
    "corrupt-image": corrupt_image,
    "corrupt-image-dali": lambda folder: corrupt_image(folder, "dali"),
    "lost-rank": lost_rank,
    "lost-launcher": lost_launcher,
    "sigterm": lambda folder: stop(folder, signal.SIGTERM),
    "sigterm-torchrun": lambda folder: stop(folder, signal.SIGTERM, processes=2),
    "sigusr1": lambda folder: stop(folder, signal.SIGUSR1),
    "sigusr1-torchrun": lambda folder: stop(folder, signal.SIGUSR1, processes=2),
    "sigusr1-rank": lambda folder: stop(folder, signal.SIGUSR1, processes=2, one_rank=True),
}

if __name__ == "__main__":
    main()
