"""Progress on the console."""

from __future__ import annotations

import sys

import pytest
import torch

from tal_fast.training import progress
from tal_fast.training.progress import Progress, epoch_line, memory_in_use

ROW = {"epoch": 3, "train_loss": 0.51234, "train_accuracy": 0.9, "val_accuracy": 0.8765, "aurc": 0.0123456}


def test_an_epoch_line_has_loss_accuracies_aurc_rate_and_remaining_time() -> None:
    line = epoch_line({**ROW, "images_per_s": 1234.5, "typicalness": 0.5}, epochs=24, seconds=10.0)
    assert line == "epoch  3/24  loss 0.5123  acc 90.00%  val 87.65%  AURC 0.01235  1,234 images/s  ETA 4 min"


def test_the_line_of_an_epoch_that_was_not_validated_says_so() -> None:
    row = {**ROW, "val_accuracy": float("nan"), "aurc": float("nan"), "images_per_s": 9.0}
    assert "  acc 90.00%  not validated  9 images/s" in epoch_line(row, epochs=24, seconds=10.0)


@pytest.mark.parametrize("rate", [0.5, 99_999.0, 999_999.0])
@pytest.mark.parametrize("loss", [9.99999, 123456.0, float("nan")])
def test_an_epoch_line_fits_100_columns(loss: float, rate: float) -> None:
    row = {"epoch": 1, "train_loss": loss, "train_accuracy": 1.0, "val_accuracy": 1.0, "aurc": 1.0}
    line = epoch_line({**row, "images_per_s": rate}, epochs=300, seconds=6000.0)
    assert len(line) <= 100
    assert line.endswith("ETA 20 d 18 h")


def test_a_bar_advances_and_describes_once_a_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress("epoch 1/2", total=100, done=40, show=True)
    described = []

    def describe() -> str:
        described.append(now[0])
        return "loss 0.5"

    for now[0] in (0.4, 0.8, 1.2, 1.6):
        bar.advance(10, describe)
    bar.close()
    assert described == [1.2]
    err = capsys.readouterr().err
    assert "epoch 1/2" in err
    assert "loss 0.5" in err


@pytest.mark.parametrize(("show", "terminal"), [(False, True), (True, False)])
def test_a_hidden_bar_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], show: bool, terminal: bool
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    bar = Progress("epoch 1/2", total=100, done=0, show=show)
    bar.advance(100, lambda: pytest.fail("described though hidden"))
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_the_memory_of_a_process_is_in_bytes() -> None:
    assert 50e6 < memory_in_use(torch.device("cpu")) < 100e9
