"""Ranks: devices, collectives of one process and of two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tal_fast.utils.distributed import Ranks, choose_device

ROOT = Path(__file__).parents[2]
TWO_RANKS = """
import torch
from tal_fast.utils.distributed import Ranks

ranks = Ranks.start("cpu")
rank = ranks.rank
assert ranks.world_size == 2
assert ranks.max(rank) == 1
assert ranks.sum(torch.tensor([1.0 + rank])).tolist() == [3.0]
assert ranks.gather({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
calls = []
assert ranks.on_main(lambda: calls.append(rank) or "result") == "result"
assert calls == ([0] if rank == 0 else [])

def refuse():
    raise ValueError("refused")

try:
    ranks.on_main(refuse)
except ValueError as error:
    assert str(error) == "refused"
else:
    raise AssertionError("no rank may go on")
norm = torch.nn.BatchNorm1d(1)
norm.running_mean.fill_(2.0 * rank)
ranks.average_buffers(norm)
assert norm.running_mean.item() == 1.0
norm.running_mean.fill_(rank + 5.0)
ranks.broadcast_buffers(norm)
assert norm.running_mean.item() == 5.0
ranks.barrier()
ranks.stop()
print("done", flush=True)
"""


def test_one_process_needs_no_process_group() -> None:
    ranks = Ranks.start("cpu")
    assert (ranks.rank, ranks.world_size, ranks.device, ranks.is_main) == (0, 1, torch.device("cpu"), True)
    assert ranks.max(3) == 3
    assert ranks.gather("x") == ["x"]
    assert ranks.on_main(lambda: 5) == 5
    assert not torch.distributed.is_initialized()
    ranks.barrier()
    ranks.stop()


def test_two_ranks_exchange_values(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(TWO_RANKS)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            str(tmp_path / "program.py"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_unusable_devices_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == "cpu"
    with pytest.raises(ValueError, match="device is 'cuda' but PyTorch sees no GPU here; use --device cpu or auto"):
        Ranks.start("cuda")
    with pytest.raises(ValueError, match="the device 'cuda:99' cannot be used"):
        Ranks.start("cuda:99")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is 'meta' but torchrun's processes choose theirs; use auto, cpu or"):
        Ranks.start("meta")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs here but torchrun started a process number 3"):
        Ranks.start("auto")
