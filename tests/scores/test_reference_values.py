"""Scores against values of their authors' code, made by ``tests/data/scores_reference.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tal_fast.evaluation.fitted_scores import fit_score
from tal_fast.runs.prediction_store import Outputs
from tal_fast.scores import SCORES, max_logit_pnorm, msp
from tal_fast.scores.features import FeatureScorer, Training

CASES = [
    {name: value if name in ("scores", "chosen") else np.array(value) for name, value in json.loads(line).items()}
    for line in (Path(__file__).parents[1] / "data" / "scores_cases.json").read_text().splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=["5-classes", "120-classes"])
def test_scores_are_their_authors(case: dict[str, Any]) -> None:
    z = case["logits"]
    for name, want in case["scores"].items():
        if name == "ctm":
            training = Training(case["train_features"], case["train_labels"])
            got = FeatureScorer(training).scores(["ctm"], z, case["features"])["ctm"]
        else:
            kind, _, p = name.partition(" ")
            got = max_logit_pnorm(int(p))(z) if kind == "pnorm" else SCORES[kind](z)
        # Their GEN takes 1 - p of a rounded p, and so saturates near 1.
        rows = msp(z) < 1 - 1e-8 if name == "gen" else slice(None)
        rtol = 1e-8 if name == "gen" else 1e-12
        np.testing.assert_allclose(got[rows], np.array(want)[rows], rtol=rtol, atol=1e-13, err_msg=name)


@pytest.mark.parametrize("case", CASES, ids=["5-classes", "120-classes"])
def test_p_is_chosen_as_by_its_authors(case: dict[str, Any]) -> None:
    _, entry = fit_score("pnorm", Outputs(case["logits"], None, case["labels"]), "old-fd")
    assert entry["chosen"] == case["chosen"]
