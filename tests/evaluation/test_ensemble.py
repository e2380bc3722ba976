"""Several models' outputs as those of one."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from tal_fast import evaluate
from tal_fast.evaluation.ensemble import combine
from tal_fast.evaluation.npz import read_npz
from tal_fast.evaluation.pipeline import EvaluationInputs
from tal_fast.metrics.failure import failure_metrics
from tal_fast.runs.prediction_store import Outputs
from tests.helpers.evaluation import make_run, read_json, write_npz


def members(count: int = 3, samples: int = 50, classes: int = 4) -> list[EvaluationInputs]:
    rng = np.random.default_rng(2)
    labels, far = rng.integers(classes, size=samples), np.full(7, -1)
    return [
        EvaluationInputs(
            Outputs(3 * rng.normal(size=(samples, classes)), None, labels),
            {"far": Outputs(rng.normal(size=(7, classes)).astype(np.float32), None, far)},
            {"far": Outputs(rng.normal(size=(9, classes)), None, labels[:9])},
        )
        for _ in range(count)
    ]


def test_mean_softmax_mutual_information_and_disagreement() -> None:
    given = members()
    joint = combine(given)
    for got, parts in (
        (joint.id, [m.id for m in given]),
        (joint.ood["far"], [m.ood["far"] for m in given]),
        (joint.shifts["far"], [m.shifts["far"] for m in given]),
    ):
        p = np.stack([softmax(part.logits.astype(float), axis=1) for part in parts])
        np.testing.assert_allclose(softmax(got.logits, axis=1), p.mean(0), rtol=1e-12)
        np.testing.assert_allclose(np.exp(got.logits), p.mean(0), rtol=1e-12)
        information = entropy(p.mean(0), axis=1) - entropy(p, axis=2).mean(0)
        np.testing.assert_allclose(got.scores["mutual_information"], -information, atol=1e-12)
        differ = (p.argmax(2) != p.mean(0).argmax(1)).mean(0)
        np.testing.assert_allclose(got.scores["disagreement"], -differ, atol=1e-12)
        cosines = [part.logits.max(1) / np.linalg.norm(part.logits.astype(float), axis=1) for part in parts]
        np.testing.assert_allclose(got.scores["mean_cosine"], np.mean(cosines, axis=0), rtol=1e-6)
        np.testing.assert_array_equal(got.labels, parts[0].labels)
    same = combine([given[0]] * 3).id
    np.testing.assert_allclose(same.scores["mutual_information"], 0, atol=1e-12)
    assert not same.scores["disagreement"].any()


def test_members_of_other_samples_are_refused() -> None:
    first, second = members(2)
    flipped = dataclasses.replace(second.id, labels=second.id.labels[::-1])
    narrow = Outputs(second.id.logits[:, :3], None, second.id.labels)
    for changes in ({"id": flipped}, {"id": narrow}, {"ood": {}}, {"identity": {"val": "0"}}):
        with pytest.raises(ValueError, match="member 2 of the ensemble has other samples, sets or classes"):
            combine([first, dataclasses.replace(second, **changes)])


def test_saved_outputs_as_an_ensemble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(4)
    paths = [
        str(
            write_npz(
                tmp_path / f"{i}.npz", ood_noise_logits=rng.normal(size=(90, 5)), logits=rng.normal(size=(200, 5))
            )
        )
        for i in range(3)
    ]
    assert evaluate.main(["--ensemble", *paths]) == 0
    assert capsys.readouterr().out.startswith(f"ensemble of 3: {paths[0]}, ")
    report = read_json(tmp_path / "ensemble-report")
    joint = combine([read_npz(path) for path in paths]).id
    assert report["ensemble"] == paths
    assert list(report["settings"]["new_fd"]) == ["msp", "mutual_information", "disagreement", "mean_cosine"]
    want = failure_metrics(joint.scores["mutual_information"], joint.correct)
    assert report["settings"]["old_fd"]["mutual_information"] == pytest.approx(want)
    assert evaluate.main(["--ensemble", *paths, "--scores", "logits", "--output", str(tmp_path / "out")]) == 0
    assert {"cosine", "max_logit", "energy"} == set(read_json(tmp_path / "out")["left_out"])
    capsys.readouterr()
    for options, message in (
        ([paths[0]], "an ensemble needs two members or more"),
        ([paths[0], paths[1], paths[0]], "each with outputs of its own"),
        ([*paths, "--temperature", "held-out"], "--temperature does not go with --ensemble"),
        ([*paths, "--ood", "far=uniform:9"], "--ood and --shift go with runs"),
        ([*paths, "--fast"], "--fast does not go with --ensemble"),
    ):
        assert evaluate.main(["--ensemble", *options]) == 2
        assert message in capsys.readouterr().err
    alone = ["--npz", paths[0], "--scores", "msp", "disagreement", "--output", str(tmp_path / "one")]
    assert evaluate.main(alone) == 0
    assert "needs several models" in read_json(tmp_path / "one")["left_out"]["disagreement"]


def test_runs_as_an_ensemble(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / f"run-{seed}", "ce", seed=seed)) for seed in (0, 1)]
    options = ["--ood", "far=uniform:20", "--device", "cpu", "--mix", "all"]
    assert evaluate.main(["--ensemble", *runs, *options]) == 0
    report = read_json(tmp_path / "ensemble-report")
    assert report["counts"]["ood"] == {"noise": 1000, "far": 20}
    single = [evaluate.main(["--run", run, *options]) or read_json(Path(run)) for run in runs]
    assert report["counts"]["id"] == single[0]["counts"]["id"] == 200
    # One run and its copy give that run's own softmax.
    shutil.copytree(runs[0], tmp_path / "copy")
    assert evaluate.main(["--ensemble", runs[0], str(tmp_path / "copy"), *options]) == 2
