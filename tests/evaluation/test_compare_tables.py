"""Tables of a comparison in every format."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tal_fast.evaluation.compare import Column, Estimate, Group, columns_of, group_runs
from tal_fast.evaluation.compare_tables import conclusions, format_comparison, format_summary
from tal_fast.evaluation.tables import WIDTH
from tests.helpers.compare import csv_rows, one_report, table_lines, write_run


def test_the_best_of_each_metric_is_marked() -> None:
    reports = [one_report("msp", 0.2, 0.8), one_report("msp", 0.1, math.nan), one_report("msp", 0.3, 0.7)]
    groups = group_runs(reports, ["a", "b", "c"])
    columns = columns_of(groups, ["aurc", "auroc"])
    groups[1].best.add(columns[0])
    assert format_comparison(groups, columns, "table").splitlines() == [
        "run  score  accuracy",
        "a    msp      90.00%",
        "b    msp      90.00%",
        "c    msp      90.00%",
        "",
        "Old FD",
        "metric  run    value",
        "AURC    a    0.20000",
        "        b    0.10000*",
        "        c    0.30000",
        "AUROC   a     0.8000",
        "        b          -",
        "        c     0.7000",
    ]
    assert "100.00*" in format_comparison(groups, columns, "table", "paper")


def long_group(name: str, baseline: str, columns: list[Column]) -> Group:
    report = one_report("cosine", 0.123456, 0.987654)
    report["settings"]["shift"] = report["settings"]["old_fd"]
    group = Group(name, ["x", "y"], [report, report], [None, None], "cosine", [0, 1], baseline)
    group.differences = {column: Estimate(-0.123456, -0.234567, 0.012345, "both") for column in columns if baseline}
    return group


@pytest.mark.parametrize("units", ["natural", "paper"])
def test_text_tables_fit_the_terminal(units: str) -> None:
    columns = [(setting, metric) for setting in ("old_fd", "shift") for metric in ("aurc", "aupr_success")]
    short, long = "a-run-with-a-name-of-30-letter", "a run with a name that is longer than thirty characters"
    for names, baselines, labels in (
        ([short, short[:-1] + "2"], ["", short], [short, short[:-1] + "2"]),
        ([short, long], ["", short], ["(1)", "(2)"]),
        ([short, "ce", "tal", "tal2"], ["", "", short, "ce"], ["(1)", "(2)", "(3)", "(4)"]),
    ):
        groups = [long_group(name, baseline, columns) for name, baseline in zip(names, baselines, strict=True)]
        text = format_comparison(groups, columns, "table", units)
        assert max(map(len, text.splitlines())) <= WIDTH
        for name, label in zip(names, labels, strict=True):
            assert name in text
            assert f"AUPR-success  {label} " in text or f"              {label} " in text


def groups_with(sets: list[str], names: list[str], aurc: dict[str, float]) -> list[Group]:
    """Groups of two runs with the AURC of each setting; other settings have that of 0.2."""
    report = one_report("msp", 0.2, 0.8, ood_names=sets)
    keys = ["new_fd", *(f"new_fd/{name}" for name in sets if len(sets) > 1)]
    values = report["settings"]["old_fd"]["msp"]
    report["settings"] |= {key: {"msp": {**values, "aurc": aurc.get(key, 0.2)}} for key in keys}
    return [Group(name, ["x", "y"], [report, report], [None, None], "msp", [0, 1]) for name in names]


def test_conclusions_compare_in_percent_of_the_baseline() -> None:
    groups = groups_with(["svhn"], ["ce", "tal", "other"], {"new_fd": 0.4})
    assert conclusions(groups) == ""
    for group in groups[1:]:
        group.baseline = "ce"
        group.differences = {
            ("old_fd", "aurc"): Estimate(0.05, -0.01, 0.11, "seeds"),
            ("new_fd", "aurc"): Estimate(-0.124, -0.18, -0.048, "both"),
            ("old_fd", "auroc"): Estimate(0.1, 0.05, 0.15, "both"),
        }
    groups[2].differences["old_fd", "aurc"] = Estimate(0.05, 0.01, 0.09, "images")
    groups[2].differences["new_fd", "aurc"] = Estimate(-0.124, -0.6, 0.352, "both")
    groups[1].differences["new_fd/svhn", "aurc"] = Estimate(-0.124)  # no interval, no conclusion
    assert conclusions(groups).replace("\n  ", " ").splitlines() == [
        "AURC of tal compared with ce: Old FD does not differ significantly [-5%, +55%]; "
        "New FD against svhn is 31% lower [-45%, -12%].",
        "AURC of other compared with ce: Old FD is 25% higher [+5%, +45%]; "
        "New FD against svhn does not differ significantly [-100%, +88%].",
    ]
    groups = groups_with(["svhn", "photos"], ["ce", "tal"], {"new_fd": 0.4})
    groups[1].baseline = "ce"  # as in ``compare``, whose columns are the mean over the sets
    groups[1].differences = {("new_fd", "aurc"): Estimate(0.02, 0.001, 0.039, "both")}
    assert conclusions(groups) == (
        "AURC of tal compared with ce: New FD: mean over 2 OOD sets is 5% higher [+0.2%, +9.7%]."
    )
    groups = groups_with([], ["perfect", "tal"], {})
    groups[0].reports[0]["settings"]["old_fd"]["msp"]["aurc"] = 0.0  # nothing is a share of 0
    groups[1].baseline, groups[1].differences = "perfect", {("old_fd", "aurc"): Estimate(0.1, 0.05, 0.15, "both")}
    assert conclusions(groups) == "AURC of tal compared with perfect: Old FD is 0.10000 where that has 0."


def test_another_metric_is_summed_up_and_concluded_on() -> None:
    groups = groups_with(["svhn"], ["ce", "tal"], {"new_fd": 0.4})
    for report in (groups[0].reports[0], groups[1].reports[0]):
        for setting in report["settings"].values():
            setting["msp"]["auroc"] = 0.8
    groups[1].baseline = "ce"
    groups[1].differences = {("old_fd", "auroc"): Estimate(0.04, 0.02, 0.06, "both")}
    assert conclusions(groups) == ""
    assert conclusions(groups, "auroc") == "AUROC of tal compared with ce: Old FD is 5% higher [+2%, +8%]."
    text = format_summary(groups, ["9 s", "10 s"], "auroc")
    assert "AURC" not in text
    assert text.count("AUROC (%) ↑") == 2
    row = re.split(" {2,}", text.splitlines()[-1])
    assert row == ["tal", "msp", "90.00% ± 0.00", "80.00 ± 0.00", "80.00 ± 0.00", "10 s"]


def test_many_sets_are_summed_up_by_near_and_far() -> None:
    sets = ["near/a", "near/b", "far/c", "far/d"]
    groups = groups_with(sets, ["ce", "tal"], {"new_fd/near": 0.3, "new_fd/far": 0.1})
    report = groups[0].reports[0]
    values = report["settings"]["old_fd"]["msp"]
    report["settings"] |= {
        f"new_fd/{name}": {"msp": {**values, "aurc": v}} for name, v in (("near", 0.3), ("far", 0.1))
    }
    text = format_summary(groups, ["9 s", "10 s"])
    assert re.search(r"mean over +mean over *\n +2 near OOD sets +2 far OOD sets", text.replace("Old FD", ""))
    assert "300.00 ± 0.00" in text
    assert "100.00 ± 0.00" in text
    two = groups_with(["near/a", "far/c"], ["ce", "tal"], {"new_fd/near/a": 0.3, "new_fd/far/c": 0.1})
    assert "near/a" in format_summary(two, ["9 s", "10 s"])


LONG = [f"set-with-a-long-name-{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("sets", "titles", "cells"),
    [
        (["a"], ["New FD", "a"], ["123.46"]),
        (["a", "b"], ["New FD", "a", "b"], ["200.00", "40.00"]),
        (LONG[:3], ["mean over\n", "3 OOD sets"], ["123.46"]),  # each would be too wide
        (LONG, ["mean over\n", "4 OOD sets"], ["123.46"]),
    ],
)
@pytest.mark.parametrize("name", ["fmfp-tal", "tal-t_max=20-t_min=2-weight_decay=0.0005"])
def test_the_summary_fits_the_terminal(sets: list[str], titles: list[str], cells: list[str], name: str) -> None:
    groups = groups_with(sets, ["ce", name], {"new_fd": 0.123456, "new_fd/b": 0.04})
    text = format_summary(groups, ["9 s", "3 h 05 min"])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(title in text for title in titles)
    assert name in text
    row = re.split(" {2,}", text.splitlines()[-1])
    label = name if name == "fmfp-tal" else "(2)"
    assert row == [label, "msp", "90.00% ± 0.00", *(f"{cell} ± 0.00" for cell in ["200.00", *cells]), "3 h 05 min"]


def test_latex_and_markdown_have_a_row_per_run() -> None:
    groups = group_runs([one_report("msp", 0.2, 0.8), one_report("msp", 0.1, 0.9)], ["a_b & 50%", "<b>|*"])
    columns = columns_of(groups, ["aurc"])
    groups[1].best.add(columns[0])
    latex = format_comparison(groups, columns, "latex").splitlines()
    assert latex == [
        r"\begin{tabular}{lrrr}", r"\toprule",
        r"\multicolumn{3}{c}{} & \multicolumn{1}{c}{Old FD} \\", r"\cmidrule(lr){4-4}",
        r"run & score & accuracy $\uparrow$ & AURC $\downarrow$ \\", r"\midrule",
        r"a\_b \& 50\% & msp & 90.00\% & 0.20000 \\",
        r"$<$b$>$|* & msp & 90.00\% & \textbf{0.10000} \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
    markdown = format_comparison(groups, columns, "markdown").splitlines()
    assert markdown[0] == "| run | score | accuracy ↑ | Old FD AURC ↓ |"
    assert markdown[3] == r"| \<b\>\|\* | msp | 90.00% | **0.10000** |"


def test_differences_are_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, quality in (("first", 1.0), ("second", 2.0)):
        write_run(tmp_path / name, {"first": "ce", "second": "tal"}[name], 0, quality)
    runs = [str(tmp_path / name) for name in ("first", "second")]
    runs += ["--bootstrap", "50", "--metrics", "auroc"]
    row = csv_rows(runs, capsys)["second", "old_fd", "auroc"]
    cell = f"+{float(row['difference']):.4f} [+{float(row['low']):.4f}, +{float(row['high']):.4f}]"
    for style in ("table", "markdown", "latex"):
        out = tmp_path / "tables" / f"out.{style}"
        assert table_lines([*runs, "--format", style, "--out", str(out)], capsys) == []
        assert (cell if style != "markdown" else cell.replace("[", "\\[").replace("]", "\\]")) in out.read_text()
        assert re.search("^95% intervals: over the test images, paired", out.read_text().replace("% 95", "95"), re.M)


def test_latex_compiles_with_any_names(tmp_path: Path) -> None:
    """Compiled where there is a pdflatex; its braces, dollars and numbers of cells are checked anyway."""
    reports = [one_report("msp", aurc, 0.8, ood_names=["s_v$h%n", "b"]) for aurc in (0.2, 0.1)]
    for report in reports:
        report["settings"] |= {key: report["settings"]["old_fd"] for key in ("new_fd/s_v$h%n", "new_fd/b", "new_fd")}
    groups = group_runs(reports, ["a_b & 50% #~^{\\}", "$1 <x> ± \x1b"])
    columns = columns_of(groups, ["aurc", "new-fd/*:aurc", "new-fd/*:auroc"])
    assert [setting for setting, _ in columns] == ["old_fd", "new_fd", *["new_fd/s_v$h%n"] * 2, *["new_fd/b"] * 2]
    groups[1].baseline = groups[0].name
    groups[1].differences = {column: Estimate(-0.1, -0.2, -0.05, "images") for column in columns}
    groups[0].intervals = {column: Estimate(0.2, 0.15, 0.25, "images") for column in columns}
    groups[1].best.add(columns[0])
    latex = format_comparison(groups, columns, "latex", "paper", ("differences", "intervals", "marks"))
    assert r"\textbf{100.00}$^{\dagger}$" in latex  # less AURC is better,
    assert r"80.00$^{\ddagger}$" in latex  # less AUROC is worse
    assert r"200.00 [150.00, 250.00]" in latex
    assert r"$-$100.00 [$-$200.00, $-$50.00]" in latex
    assert r"\multicolumn{2}{c}{New FD against s\_v\$h\%n}" in latex
    assert r"AURC $\times$1000 $\downarrow$ & AUROC (\%) $\uparrow$" in latex
    for table in latex.split("\n\n"):
        plain = re.sub(r"\\[\\&%$#_{}]", "", table.replace("\\\\\n", "\n"))
        assert plain.count("{") == plain.count("}")
        assert all(line.count("$") % 2 == 0 for line in plain.splitlines())
        width = len(re.findall("[lr]", re.findall(r"tabular}{(\w+)}", table)[0]))
        for row in (line for line in plain.splitlines() if "&" in line):
            assert (
                sum(map(int, re.findall(r"multicolumn{(\d+)}", row)))
                + len([cell for cell in row.split("&") if "multicolumn" not in cell])
                == width
            )
    if shutil.which("pdflatex"):
        (tmp_path / "t.tex").write_text(
            "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\n" + latex + "\n\\end{document}\n"
        )
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "t.tex"]
        found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout[-2000:]


def test_best_is_marked_only_if_significant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, quality, seed in (("ce", 1.0, 0), ("tal", 3.0, 1), ("fmfp", 0.99, 0)):
        write_run(tmp_path / name, name, seed, quality)
    near = [str(tmp_path / name) for name in ("ce", "fmfp")]
    command = ["--bootstrap", "100", "--metrics", "old-fd:auroc"]
    rows = csv_rows([*near, str(tmp_path / "tal"), *command], capsys)
    assert [rows[name, "old_fd", "auroc"]["best"] for name in ("ce", "fmfp", "tal")] == ["0", "0", "1"]
    without = csv_rows([*near, str(tmp_path / "tal"), *command[2:], "--bootstrap", "0"], capsys)
    assert {row["best"] for row in without.values()} == {"0"}
    excluded = []
    for seed in range(2, 10):
        write_run(tmp_path / f"tal-{seed}", "tal", seed, 1.0 + seed / 10)
        rows = csv_rows([near[0], str(tmp_path / f"tal-{seed}"), *command], capsys)
        difference = rows[f"tal-{seed}", "old_fd", "auroc"]
        excluded.append(float(difference["low"]) > 0 or float(difference["high"]) < 0)
        assert sum(int(row["best"]) for row in rows.values()) == excluded[-1]
    assert len(set(excluded)) == 2
