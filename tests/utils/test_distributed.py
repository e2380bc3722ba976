"""Ranks: devices, collectives of one process and of two."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from tal_fast.utils import distributed
from tal_fast.utils.distributed import Ranks, choose_device, name_lost_ranks
from tests.helpers.ranks import run_ranks


def test_one_process_needs_no_process_group() -> None:
    ranks = Ranks.start("cpu")
    assert (ranks.rank, ranks.world_size, ranks.device, ranks.is_main) == (0, 1, torch.device("cpu"), True)
    assert ranks.max(3) == 3
    assert ranks.gather("x") == ["x"]
    assert ranks.on_main(lambda: 5) == 5
    assert not torch.distributed.is_initialized()
    ranks.barrier()
    ranks.stop()


def exchange(rank: int) -> None:
    """Check every collective on one of two ranks."""
    ranks = Ranks(rank, 2, torch.device("cpu"))
    assert ranks.max(rank) == 1
    assert ranks.sum(torch.tensor([1.0 + rank])).tolist() == [3.0]
    assert ranks.gather({"rank": rank}) == ([{"rank": 0}, {"rank": 1}] if rank == 0 else [])
    calls = []
    assert ranks.on_main(lambda: calls.append(rank) or "result") == "result"  # type: ignore[func-returns-value]
    assert calls == ([0] if rank == 0 else [])

    def refuse() -> None:
        raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        ranks.on_main(refuse)
    norm = torch.nn.BatchNorm1d(1)
    assert norm.running_mean is not None
    norm.running_mean.fill_(2.0 * rank)
    ranks.average_buffers(norm)
    assert norm.running_mean.item() == 1.0
    norm.running_mean.fill_(rank + 5.0)
    ranks.broadcast_buffers(norm)
    assert norm.running_mean.item() == 5.0
    ranks.barrier()


def test_two_ranks_exchange_values(tmp_path: Path) -> None:
    assert run_ranks(exchange, 2, tmp_path) == [None, None]


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


def start_unequally(rank: int) -> str:
    ranks = Ranks(rank, 2, torch.device("cpu"))
    ranks.check_same({"seed": 3, "classes": list(range(1000))})
    with pytest.raises(ValueError, match="differs") as caught:
        ranks.check_same({"seed": rank, "lr": 0.1, **({"extra": "x"} if rank else {})})
    return str(caught.value)


def test_ranks_that_differ_are_refused_on_every_rank(tmp_path: Path) -> None:
    sentence = (
        "rank 1 differs from rank 0 (seed is 1, not 0; extra is 'x', not None); start all ranks with the same command"
    )
    assert run_ranks(start_unequally, 2, tmp_path) == [sentence, sentence]


def wait_for_a_hung_rank(rank: int) -> tuple[str | None, str | None]:
    ranks = Ranks(rank, 3, torch.device("cpu"))
    ranks.barrier()
    ranks.limit_waiting(0.5)
    if rank == 1:
        time.sleep(5)
        return None, None
    distributed.GRACE_S = 3.0
    with pytest.raises(RuntimeError) as caught:
        ranks.barrier()
    return name_lost_ranks(caught.value), name_lost_ranks(RuntimeError("mine"))


def test_a_hung_rank_is_named_by_the_first_that_waited(tmp_path: Path) -> None:
    first, hung, other = run_ranks(wait_for_a_hung_rank, 3, tmp_path)
    assert first == (
        "error: rank 1 did not answer within 0.5 s and may hang; run the same command again (training: with "
        "--resume auto), unless torchrun does\n",
        None,
    )
    assert hung == (None, None)
    assert other == ("", None)
