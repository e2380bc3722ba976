"""Printed tables."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from tal_fast.config.names import FEATURE_SCORES, LOGIT_SCORES, SIRC_SCORES
from tal_fast.evaluation.evaluation import evaluate_samples
from tal_fast.evaluation.report import EvaluationOptions
from tal_fast.evaluation.sample_scores import Samples
from tal_fast.evaluation.tables import (
    WIDTH,
    describe_samples,
    escape,
    format_percent,
    format_report,
    format_table,
    format_value,
    mark_best,
    printable,
    setting_title,
)
from tal_fast.metrics.settings import Mix


def test_text_tables_align_columns_of_several_lines() -> None:
    assert format_table(["name", "AUPR\nerror"], [["a", "0.1"], ["bcdef", "0.25"]]).splitlines() == [
        "        AUPR",
        "name   error",
        "a        0.1",
        "bcdef   0.25",
    ]


def test_latex_and_markdown_are_escaped() -> None:
    assert escape("a_b & 50% {x}\\", "latex") == r"a\_b \& 50\% \{x\}\textbackslash{}"
    assert escape("<script>|*", "markdown") == r"\<script\>\|\*"
    assert format_table(["a_b", "c"], [["x", "y"]], "latex").splitlines()[:3] == [
        r"\begin{tabular}{lr}", r"\toprule", r"a\_b & c \\",
    ]  # fmt: skip
    assert format_table(["a", "b"], [["x", "y"]], "markdown") == "| a | b |\n| --- | ---: |\n| x | y |"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain ä.png", "plain ä.png"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9" if os.fsencode("\udce9") == b"\xe9" else "caf\udce9"),
        ("a\x1b[2J\u202eb\x00", "a\\x1b[2J\\u202eb\\x00"),
        ("\U000e0001", "\\U000e0001"),
    ],
)
def test_characters_that_do_not_print_are_escaped(name: str, shown: str) -> None:
    assert printable(name) == shown


def test_values_are_formatted_by_metric_and_unit() -> None:
    assert [format_value("aurc", 0.1234567, units) for units in ("natural", "paper")] == ["0.12346", "123.46"]
    assert [format_value("auroc", 0.1234567, units) for units in ("natural", "paper")] == ["0.1235", "12.35"]
    assert format_value("auroc", math.nan) == format_percent(math.nan) == "-"
    assert mark_best([0.1, math.nan, 0.3, 0.3], True) == [False, False, True, True]
    assert mark_best([math.nan], False) == [False]
    assert mark_best([math.nan, 0.1], False) == [False, False]  # nothing to be better than


def test_titles_name_the_set() -> None:
    one, two = {"ood_names": ["a"], "shift_names": ["fog"]}, {"ood_names": ["a", "b"], "shift_names": []}
    assert setting_title("new_fd", one) == setting_title("new_fd/a", two) == "New FD against a"
    assert setting_title("shift", one) == "Old FD under shift (fog)"
    assert setting_title("ood", two) == "OOD: mean over 2 OOD sets"


@pytest.mark.parametrize("units", ["natural", "paper"])
def test_printed_reports_fit_the_terminal(units: str) -> None:
    """With every score, intervals, differences, long names and undefined metrics."""
    rng = np.random.default_rng(0)
    names = (*LOGIT_SCORES, *FEATURE_SCORES, *SIRC_SCORES)
    correct = rng.random(60) < 0.3

    def scores(n: int) -> dict[str, np.ndarray]:
        return {name: rng.integers(50, size=n) / 50 for name in names}

    sets = {"far": scores(40), "a set with quite a long name, which goes into titles": scores(30)}
    shifts = {"fog": (np.ones(20), scores(20))}
    samples = Samples(correct, scores(60), sets, {}, shifts=shifts)
    report = evaluate_samples(samples, EvaluationOptions(intervals=True, mix=Mix("all"))).report
    report |= {
        "calibration": {"ece": 0.1, "nll": 2.0, "brier": None},
        "temperature": {"value": 1.5, "held_out": 20, "calibration_before": {"ece": 0.2}},
        "left_out": {"vim": "it needs the features of every set, and there are no ood_far_features and many more"},
    }
    text = format_report(report, units)
    assert max(map(len, text.splitlines())) <= WIDTH
    for part in (
        "ID accuracy",
        "ECE 0.1000 (15 bins), NLL 2.0000 nats",
        "logits divided by T = 1.5000",
        "left out: vim:",
    ):
        assert part in text
    assert "Undefined (AUROC, FPR95, TNR95, AUPR-error): there are no errors among the 20 samples" in text
    assert "Samples with tied scores: cosine " in text
    assert text.count("Paired differences to cosine:") == len(report["settings"]) == 8
    assert "times 1000" in text or units == "natural"


def test_of_many_scores_the_ten_best_are_printed() -> None:
    rng = np.random.default_rng(0)
    correct = rng.random(300) < 0.7
    scores = {f"s{i:02}": (i / 10) * correct + rng.normal(size=300) for i in range(14)}
    report = evaluate_samples(Samples(correct, scores, {}, {}), EvaluationOptions(intervals=True)).report
    aurc = {score: values["aurc"] for score, values in report["settings"]["old_fd"].items()}
    ranked = sorted(aurc, key=aurc.__getitem__)

    def rows(text: str) -> list[str]:
        return [line.split()[0] for line in text.splitlines() if line.startswith("s") and line[1:3].isdigit()]

    assert set(rows(format_report(report))) <= {*ranked[:10]}
    assert rows(format_report(report))[:10] == ranked[:10]
    assert "best by AURC; 4 more scores are in report.json and report.html" in format_report(report)
    own = format_report({**report, "score": ranked[-1]})  # the model's own is always there
    assert rows(own)[:11] == [*ranked[:10], ranked[-1]]
    assert "3 more scores" in own
    few = evaluate_samples(Samples(correct, dict(list(scores.items())[:10]), {}, {}), EvaluationOptions()).report
    assert rows(format_report(few)) == list(scores)[:10]
    assert "more scores" not in format_report(few)


@pytest.mark.parametrize(("errors", "words"), [(0, "0 errors"), (1, "1 error"), (2, "2 errors")])
def test_a_single_error_is_no_plural(errors: int, words: str) -> None:
    report = {"aurc_floor": {"old_fd": 0.1}, "aurc_random": {"old_fd": 0.2}}
    report["samples"] = {"old_fd": {"id": 9, "ood": 0, "errors": errors}}
    assert describe_samples(report, "old_fd").startswith(f"9 ID, {words}; AURC")
