"""Experiment files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tal_fast.experiments.parse import check_settings, read_experiment
from tal_fast.experiments.plan import SelectOptions
from tests.helpers.experiments import error_of, write

ROOT = Path(__file__).parents[2]


def test_base_and_methods_may_be_files_next_to_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {dataset: digits, channels: 1}\nepochs: 3\nseed: 9\noutput: x\n")
    (tmp_path / "selected.yaml").write_text("methods: {tal: {method: {name: tal, t_max: 40}}}\n")
    path = write(tmp_path / "e.yaml", base="mine.yaml", methods="selected.yaml", overrides=None)
    job = read_experiment(path).jobs[0]
    assert (job.config.epochs, job.config.method.options["t_max"], job.config.seed, job.name) == (3, 40, 0, "tal-seed0")


def test_the_files_in_docs_and_examples_are_valid(tmp_path: Path) -> None:
    (block,) = re.findall(
        r"^```yaml\n(.*?)^```", (ROOT / "docs" / "experiments.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "e.yaml").write_text(block)
    assert len(read_experiment(tmp_path / "e.yaml").jobs) == 5 * (2 + 4)
    for path in (ROOT / "examples" / "experiments").glob("*.yaml"):
        assert len(read_experiment(path).jobs) > 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"overides": {}}, "'overides' is not a key of an experiment; there are base, overrides, seeds"),
        ({"methods": None}, "has no 'methods'; an experiment needs base, methods and seeds"),
        ({"methods": {}}, "methods is empty"),
        ({"methods": {"a b": {}}}, "the method 'a b' must have a name of letters"),
        ({"methods": {"tal": {"method": {"t_mx": 3}}}}, "method tal: method.t_mx is not an option; there are"),
        ({"methods": {"ce": {"seed": 1}}}, "methods.ce.seed is set by the scheduler; list seeds under 'seeds'"),
        ({"methods": "gone.yaml"}, "there is no file"),
        ({"overrides": {"epochs": 0}}, "epochs is 0 but must be at least 1"),
        ({"overrides": {"threads": 2}}, "overrides.threads is set by the scheduler; give 'threads' at the top"),
        ({"overrides": [1]}, "overrides is [1] but must be a mapping"),
        ({"base": "digits"}, "base 'digits' is neither a preset (cifar100-resnet110-ce"),
        ({"seeds": 3}, "seeds is 3 but must be a list such as [0, 1, 2]"),
        ({"seeds": [1, 1]}, "must have each seed once"),
        ({"seeds": [True]}, "a seed is True but must be a whole number of at least 0"),
        ({"threads": 0}, "threads is 0 but must be a whole number of at least 1"),
        ({"grid": {"optim.lr": 0.1}}, "grid.optim.lr is 0.1 but must be a list of values"),
        ({"grid": {"optim.lr": {"values": [1], "only": 2}}}, "grid.optim.lr has 'only'; give a list of values, or"),
        ({"grid": {"optim.lr": {"values": [1], "methods": ["fmfp"]}}}, "there is no method 'fmfp'; there are ce, tal"),
        ({"grid": {"optim.lr": [0.1, "1e-1"]}}, "would share the folder ce-lr=0.1-seed0"),
        ({"grid": {"seed": [1, 2]}}, "grid.seed is set by the scheduler"),
        ({"grid": {"data.ood.x": ["a", "b"]}}, "OOD sets do not change the training; list them under 'evaluate'"),
        ({"evaluate": {"odd": {}}}, "evaluate.odd is not an option of tal_fast.evaluate --run; there are checkpoint"),
        ({"evaluate": {"npz": "x"}}, "evaluate.npz is not an option"),
        ({"evaluate": {"checkpoint": "newest"}}, "evaluate: argument --checkpoint: invalid choice: 'newest'"),
        ({"evaluate": {"mix": "half"}}, "evaluate: argument --mix"),
        ({"evaluate": {"scores": ["cosin"]}}, "evaluate: unknown score cosin"),
        ({"evaluate": {"scores": None}}, "evaluate.scores is empty; give a value, or leave it out"),
        ({"evaluate": {"metrics": ["aurk"]}}, "evaluate: unknown metric 'aurk'; use naurc"),
        ({"evaluate": {"choose_by": "old-fd"}}, "evaluate: choosing by old-fd is for pnorm, which is not among"),
        ({"evaluate": {"fast": 1}}, "evaluate.fast is 1 but must be true or false"),
        ({"compare": {"baselin": "ce"}}, "compare.baselin is not an option; there are compare.baseline"),
        ({"compare": {"baseline": "fmfp"}}, "compare.baseline is 'fmfp' but must be one of ce, tal"),
        ({"compare": {"metrics": ["auc"]}}, "compare.metrics: 'auc' is not a metric; there are aurc"),
        ({"compare": {"metrics": ["naurc"]}}, "compare.metrics: 'naurc' is not a metric; there are aurc"),
        ({"compare": {"over": "folds"}}, "compare.over is 'folds'; use 'images' or 'seeds' or 'both'"),
        ({"select": {"metrics": ["aurc"]}}, "'aurc' must be SETTING.METRIC, such as old_fd.aurc"),
        ({"select": {"metrics": ["old_fd.eaurc"]}}, "old_fd.eaurc may be below 0"),
        ({"select": {"accuracy_loss": 2}}, "select.accuracy_loss is 2.0 but must be in [0, 1]"),
        ({"select": {"metrics": ["new_fd/x.aurc"]}}, "no run has a setting 'new_fd/x'; there are old_fd"),
        ({"select": {"metrics": ["old_fd/patches.aurc"]}}, "no run has a setting 'old_fd/patches'; there are old_fd"),
        ({"select": {"metrics": ["shift.aurc"]}}, "select.metrics: no run has a setting 'shift'; there are old_fd"),
        ({"methods": {"f": {"method.name": "fmfp", "optim.ema_decay": 0.9}}}, "f: optim.ema_decay is 0.9 but fmfp ave"),
        ({"methods": {"f": {"method.name": "fmfp", "optim.sam_radius": 0.1}}}, "f: optim.sam_radius is 0.1 but fmfp"),
        ({"methods": {"c": {"method": {"name": "crl", "class_weight": "balanced"}}}}, "method c: "),
        ({"methods": {"t": {"method.name": "tal", "mix.mixup": 1.0}}}, "t: mix.weight is null, so that there"),
        ({"methods": {"o": {"method": {"name": "openmix", "outliers": "gaussian:9"}, "mix.mixup": 1.0}}}, "method o: "),
        ({"compare": {"score": "cosin"}}, "compare.score: unknown score cosin"),
        ({"methods": {"l": {"method": {"name": "logitnorm", "options": {"tua": 1}}}}}, "l: method.options.tua is"),
        ({"methods": {"t": {"method": {"name": "tal", "t_min": 9, "t_max": 5}}}}, "t: temperatures are t_min=9.0"),
        ({"grid": {"method.t_wrong": [5, 10]}}, "grid.method.t_wrong changes nothing in ce, which is"),
        ({"grid": {"method.options.t_wrong": [5]}}, "grid.method.options.t_wrong changes nothing in ce, which is"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_sentence(
    changes: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "e.yaml", **changes)
    assert sentence in error_of([str(path), "--output", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


def test_a_single_ood_set_has_no_mean_of_its_group() -> None:
    near = SelectOptions(["new_fd/near.aurc"])
    check_settings(near, ["near/one", "far/two"], [])
    check_settings(SelectOptions(["new_fd.aurc", "ood/near/one.aurc"]), ["near/one"], [])
    with pytest.raises(ValueError, match="no run has a setting 'new_fd/near'; there are old_fd, ood, ood/near/one"):
        check_settings(near, ["near/one"], [])
