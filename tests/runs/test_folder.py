"""metrics.csv: columns and rows."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tal_fast.config.parse import load_config
from tal_fast.config.schema import Config
from tal_fast.runs.folder import COLUMNS, epoch_row, write_config, write_metrics


def test_a_row_has_the_common_columns_first_and_the_methods_own_after() -> None:
    values = {name: float(i) for i, name in enumerate(COLUMNS) if name != "epoch"}
    row = epoch_row(3, {"own": 7.0, **dict(list(values.items())[5:])}, dict(list(values.items())[:5]))
    assert list(row) == [*COLUMNS, "own"]
    assert row == {"epoch": 3, **values, "own": 7.0}
    with pytest.raises(KeyError, match="lr"):
        epoch_row(3, {"own": 7.0}, {})


def test_metrics_csv_has_a_row_for_each_epoch(tmp_path: Path) -> None:
    rows = [epoch_row(epoch, dict.fromkeys(COLUMNS[1:], 0.1), {"own": epoch / 3}) for epoch in (1, 2)]
    write_metrics(tmp_path / "new", rows)
    with open(tmp_path / "new" / "metrics.csv", newline="") as file:
        header, *lines = list(csv.reader(file))
    assert header == [*COLUMNS, "own"]
    assert [(line[0], float(line[-1])) for line in lines] == [("1", 1 / 3), ("2", 2 / 3)]
    assert (tmp_path / "new" / "metrics.csv").read_bytes().count(b"\r") == 0


def test_rows_of_an_older_version_may_lack_a_column(tmp_path: Path) -> None:
    rows = [epoch_row(epoch, dict.fromkeys(COLUMNS[1:], 0.1), {"own": 1.0}) for epoch in (1, 2)]
    rows[1]["new"] = 2.0
    write_metrics(tmp_path, rows)
    with open(tmp_path / "metrics.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert [line[-2:] for line in lines] == [["own", "new"], ["1.0", "nan"], ["1.0", "2.0"]]


def test_config_yaml_keeps_no_permission_of_one_command(tmp_path: Path) -> None:
    write_config(tmp_path, Config(seed=7, resume="auto", allow=["optim.lr"], extend=True))
    assert load_config(str(tmp_path / "config.yaml")) == Config(seed=7)
