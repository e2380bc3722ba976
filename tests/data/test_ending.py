"""Ends of loaders: at exit, after an error, and when a process or thread of theirs hangs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tal_fast.data.build import build_data
from tal_fast.data.datasets import DataBundle
from tal_fast.data.loader import Loader
from tal_fast.data.waiting import LoaderFailed
from tal_fast.utils.process import no_garbage
from tests.helpers.images import LOADERS, config, make_folder, needs_dali

# An iteration that is kept has running workers.
ENDS = {
    "returns": "",
    "raises": "raise LookupError('unexpected')",
    "leaves": "batches = iter(loader); next(batches); sys.exit(3)",
}


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch waits for a worker, and looks for its parent, once in 5 s."""
    for module in (torch.utils.data._utils, torch.utils.data._utils.worker):
        monkeypatch.setattr(module, "MP_STATUS_CHECK_INTERVAL", 0.5)


def bundle(tmp_path: Path, loader: Any = "torch", **options: Any) -> DataBundle:
    return build_data(config(make_folder(tmp_path / "images"), loader=loader, **{"workers": 2, **options}))


def processes(of: int | None = None) -> list[int]:
    """Processes that a process has started, by default this one."""
    parent = of or os.getpid()
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_script_that_dies_of_an_error_ends(tmp_path: Path) -> None:
    make_folder(tmp_path)
    script = (
        "from tal_fast.config.schema import DataConfig\nfrom tal_fast.data.build import build_data\n"
        f"data = build_data(DataConfig(root={str(tmp_path)!r}, image_size=8, workers=2, loader='torch'))\n"
        "loader = data.loader('train', batch_size=2)\nfor batch in loader:\n    raise LookupError('unexpected')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "LookupError: unexpected" in done.stderr


def _read_and_end(data: DataBundle, how: str) -> None:
    loader = data.loader("train", batch_size=2)
    list(loader)
    exec(ENDS[how], {"loader": loader, "sys": sys})


@pytest.mark.parametrize("how", ENDS)
def test_a_process_of_multiprocessing_ends(tmp_path: Path, how: str) -> None:
    """Its end differs from a script's: multiprocessing waits for the workers before any exit handler."""
    process = multiprocessing.get_context("fork").Process(target=_read_and_end, args=(bundle(tmp_path), how))
    with no_garbage():
        process.start()
    process.join(30)
    process.kill()
    assert process.exitcode == {"returns": 0, "raises": 1, "leaves": 3}[how]


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    def read(data: DataBundle) -> None:
        batches = iter(data.loader("train", batch_size=2))
        next(batches)
        next(batches)  # of the other worker: by now both watch their parent
        (tmp_path / "reading").touch()
        time.sleep(60)
        del batches  # until here its workers run

    process = multiprocessing.get_context("fork").Process(target=read, args=(bundle(tmp_path),))
    with no_garbage():
        process.start()
    assert process.pid is not None
    wait_until((tmp_path / "reading").exists)
    workers = processes(process.pid)
    assert len(workers) == 2
    process.kill()
    process.join()

    def alive() -> list[int]:
        return [pid for pid in workers if Path(f"/proc/{pid}").exists()]

    try:
        wait_until(lambda: not alive())
    finally:
        for pid in alive():  # would keep the terminal's pipe open
            os.kill(pid, signal.SIGKILL)


def test_close_ends_workers_also_after_an_error_of_the_caller(tmp_path: Path) -> None:
    loader = bundle(tmp_path).loader("train", batch_size=2)
    before = processes()

    def use() -> None:
        for _ in loader:
            raise LookupError

    with pytest.raises(LookupError) as kept:  # with its traceback, in which the iteration lives on
        use()
    workers = [pid for pid in processes() if pid not in before]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGSTOP)
    loader.close()
    assert [pid for pid in processes() if pid in workers] == []
    assert len(list(loader)) == len(loader)  # with new workers
    loader.close()
    assert kept


def _reads(loader: Loader) -> str:
    """Message of a loader that fails."""
    before = processes()
    with pytest.raises(LoaderFailed) as caught:
        list(loader)
    assert [pid for pid in processes() if pid not in before] == []
    return str(caught.value)


def test_garbage_collection_ends_workers(tmp_path: Path) -> None:
    # It closes the queues to the workers first, and workers ignored the single SIGTERM that PyTorch then sends.
    loader = bundle(tmp_path).loader("train", batch_size=2)
    before = processes()
    list(loader)
    assert len(processes()) == len(before) + 2
    cycle: list[Any] = [loader]
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    assert set(processes()) <= set(before)


def test_a_stopped_worker(tmp_path: Path) -> None:
    loader = bundle(tmp_path, timeout=2).loader("train", batch_size=2)
    before = processes()
    batches = iter(loader)
    next(batches)
    for pid in set(processes()) - set(before):
        os.kill(pid, signal.SIGSTOP)
    with pytest.raises(LoaderFailed, match="the loader did not deliver for 2 s; .* data.timeout"):
        list(batches)
    assert set(processes()) <= set(before)


def test_a_killed_worker(tmp_path: Path) -> None:
    loader = bundle(tmp_path, workers=1).loader("train", batch_size=2)
    before = processes()
    batches = iter(loader)
    next(batches)
    (worker,) = set(processes()) - set(before)
    os.kill(worker, signal.SIGSTOP)
    threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
    with pytest.raises(LoaderFailed, match="a process of the loader failed .*lower data.workers"):
        list(batches)
    assert set(processes()) <= set(before)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_file_that_hangs(tmp_path: Path, loader: str) -> None:
    data = bundle(tmp_path, loader, timeout=2)
    victim = Path(data.split("train").paths[0])  # type: ignore[union-attr]
    content = victim.read_bytes()
    victim.unlink()
    os.mkfifo(victim)  # like a file on a server that does not answer
    reader = data.loader("train", batch_size=2)
    try:
        assert "did not deliver for 2 s" in _reads(reader)
    finally:
        os.close(os.open(victim, os.O_RDWR))  # ends the hanging read
        victim.unlink()
    victim.write_bytes(content)
    assert len(list(reader)) == len(reader)
    reader.close()


@needs_dali
def test_a_script_with_a_hanging_dali_ends(tmp_path: Path) -> None:
    make_folder(tmp_path)
    script = (
        "import os\nfrom tal_fast.config.schema import DataConfig\nfrom tal_fast.data.build import build_data\n"
        f"data = build_data(DataConfig(root={str(tmp_path)!r}, image_size=8, loader='dali', timeout=1))\n"
        "os.unlink(data.split('val').paths[0])\nos.mkfifo(data.split('val').paths[0])\n"
        "list(data.loader('val', batch_size=2))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "LoaderFailed: the loader did not deliver for 1 s" in done.stderr


def test_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensor: torch.Tensor) -> None:
        raise RuntimeError("No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    message = _reads(bundle(tmp_path).loader("train", batch_size=2))
    assert "no shared memory for 0.0 MiB (No space left on device (28)); enlarge /dev/shm" in message


# The iterator that PyTorch could not finish complains when it is deleted.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_workers_that_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, started = os.fork, []

    def fork() -> int:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(1)
        return original()

    monkeypatch.setattr(os, "fork", fork)
    message = _reads(bundle(tmp_path, workers=2).loader("train", batch_size=2))
    gc.collect()
    assert message == "the 2 processes of data.workers cannot be started (Resource temporarily unavailable); lower it"
