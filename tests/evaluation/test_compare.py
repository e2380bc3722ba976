"""Groups of runs, and whether their reports can be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tal_fast.evaluation.compare import columns_of, common_name, find_group, group_runs, judging_score, read_method
from tal_fast.evaluation.compare_tables import format_comparison
from tal_fast.evaluation.differences import Comparison
from tests.helpers.compare import one_report, write_run


def test_each_run_is_judged_by_its_own_score() -> None:
    groups = group_runs([one_report("msp", 0.2, 0.8), one_report("cosine", 0.1, 0.7)], ["ce", "tal"])
    assert [(group.score, group.values(("old_fd", "aurc"))) for group in groups] == [("msp", [0.2]), ("cosine", [0.01])]
    by_msp = group_runs([one_report("msp", 0.2, 0.8), one_report("cosine", 0.1, 0.7)], ["ce", "tal"], scores="msp")
    assert [group.values(("old_fd", "aurc")) for group in by_msp] == [[0.2], [0.1]]
    with pytest.raises(ValueError, match="tal has no score 'energy'; it has msp, cosine"):
        judging_score(one_report("cosine", 0.1, 0.7), "tal", "energy")
    with pytest.raises(ValueError, match="names no score of its own; choose one with --score: msp, cosine"):
        judging_score(one_report(None, 0.2, 0.8), "npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convention": "tal"}, "convention is tal_fast in one and tal in the other"),
        ({"mix": "first-n"}, "mix is all in one and first-n in the other"),
        ({"mix": "prior=0.5", "seed": 1}, "mix is all in one and prior=0.5, seed 1 in the other"),
        ({"ood_names": ["svhn"]}, "set of OOD data is none in one and svhn in the other"),
        ({"shift_names": ["fog"]}, "set of shifted data is none in one and fog in the other"),
        ({"counts": {"id": 11, "id_right": 9, "ood": {}}}, "number of samples is 10 ID in one and 11 ID in the other"),
    ],
)
def test_numbers_that_mean_different_things_are_not_compared(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="a and b cannot be compared") as refusal:
        group_runs([one_report("msp", 0.2, 0.8), one_report("msp", 0.2, 0.8, **changes)], ["a", "b"])
    assert message in str(refusal.value)


def test_runs_of_the_same_method_differ_in_their_seed_only(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "ce", 0, 1.0)
    write_run(tmp_path / "b", "ce", 1, 1.0)
    write_run(tmp_path / "c", "tal", 0, 1.0)
    (a, seed_a), (b, seed_b), (c, _) = (read_method(tmp_path / name) for name in "abc")
    assert a == b != c
    assert (seed_a, seed_b) == (0, 1)
    assert read_method(tmp_path) == (None, None)
    (tmp_path / "a" / "config.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping"):
        read_method(tmp_path / "a")


def test_groups_are_named_after_what_their_runs_have_in_common() -> None:
    assert common_name(["runs/ce-1", "runs/ce-2"]) == "runs/ce"
    assert common_name(["ce-s0", "ce-s1"]) == "ce"
    assert common_name(["ce-seed10", "ce-seed11"]) == "ce-seed1"
    assert common_name(["a", "b"]) == "a"
    assert common_name(["ce-seed"]) == "ce-seed"


def test_a_group_is_found_by_its_name_or_a_run() -> None:
    reports = [one_report("msp", 0.1, 0.5) for _ in range(3)]
    groups = group_runs(reports, ["ce-0", "ce-1", "tal-0"], ["ce", "ce", "tal"])
    assert [group.name for group in groups] == ["ce", "tal-0"]
    assert find_group(groups, "ce") is find_group(groups, "runs/ce-1") is groups[0]
    with pytest.raises(ValueError, match="there is no row 'fmfp' to be the baseline; there are ce, tal-0"):
        find_group(groups, "fmfp")


def test_columns_may_be_of_metrics_on_request_and_of_groups_of_sets() -> None:
    reports = [one_report("msp", 0.2, 0.8, ood_names=["near/a", "near/b", "far/c"]) for _ in range(2)]
    keys = ["new_fd/near/a", "new_fd/near/b", "new_fd/far/c", "new_fd", "new_fd/near", "new_fd/far"]
    for i, report in enumerate(reports):
        report["settings"] |= dict.fromkeys(keys, report["settings"]["old_fd"])
        report["further"] = {
            "old_fd": {"msp": {"naurc": 0.5 + i, "coverage@risk=0.05": [0.25 + i, 0.1, 0.9], "cost": None}}
        }
    groups = group_runs(reports, ["a", "b"])
    wanted = ["old-fd:naurc", "new-fd/near:aurc", "old-fd:coverage@risk=0.05", "new-fd/near/*:auroc", "old-fd:cost"]
    columns = columns_of(groups, wanted)
    assert columns == [
        ("old_fd", "naurc"), ("old_fd", "coverage@risk=0.05"), ("old_fd", "cost"), ("new_fd/near", "aurc"),
        ("new_fd/near/a", "auroc"), ("new_fd/near/b", "auroc"),
    ]  # fmt: skip
    assert [group.values(columns[0]) for group in groups] == [[0.5], [1.5]]
    assert [group.values(columns[1]) for group in groups] == [[0.25], [1.25]]
    assert math.isnan(groups[0].values(columns[2])[0])
    comparison = Comparison(images=True)
    comparison.add_differences(groups, groups[0], columns)
    comparison.mark_best(groups, columns)
    assert "naurc" not in str(groups[1].best)
    latex = format_comparison(groups, columns, "latex", "paper")
    assert r"naurc $\times$1000 $\downarrow$ & coverage@risk=0.05 (\%) $\uparrow$" in latex
    with pytest.raises(ValueError, match="the reports have no 'naurc'; they have aurc"):
        columns_of(groups, ["new-fd:naurc"])
    del groups[1].reports[0]["further"]["old_fd"]
    with pytest.raises(ValueError, match=f"the report of {groups[1].runs[0]} has no 'naurc'; it has aurc"):
        columns_of(groups, ["old-fd:naurc"])
