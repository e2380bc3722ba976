"""Options of the built-in methods, and where version 0.1.0 kept them."""

from __future__ import annotations

from typing import Any

import pytest

from tal_fast.config.methods import OPTIONS, TALOptions, method_names, option_path, option_values, upgrade
from tal_fast.config.schema import Config, MethodConfig

FLAT = {
    "warmup_epochs": None, "variant": "released", "queue_size": 30000, "t_min": 5.0, "t_max": 20.0, "t_wrong": 10.0,
    "confidence_threshold": 0.5, "queue_scope": "global", "backend": "native",
}  # fmt: skip
"""Options that 0.1.0 kept beside ``name`` and wrote for every method."""


def test_every_built_in_method_has_its_option_class() -> None:
    assert set(OPTIONS) <= set(method_names())
    assert MethodConfig().options == {
        "variant": "paper", "queue_size": 20000, "t_min": 10.0, "t_max": 100.0, "t_wrong": 20.0,
        "confidence_threshold": None, "queue_scope": "local", "backend": "auto", "warmup_epochs": None,
    }  # fmt: skip
    assert MethodConfig("crl", options={"weight": "5e-1"}).options == {"weight": 0.5}
    assert MethodConfig("ce").options == {}


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("cee", {}, "method.name is 'cee'; use 'ce' or "),
        ("ce", {"tau": 1.0}, "method.options has 'tau' but ce has no options of its own"),
        ("logitnorm", {"tua": 1.0}, "method.options.tua is not an option; there are method.options.tau"),
        ("logitnorm", {"tau": 0.0}, "method.options.tau is 0.0 but must be above 0, such as 0.04"),
        ("logitnorm", {"tau": "cold"}, "method.options.tau is 'cold' but must be a finite number"),
        ("crl", {"weight": -1.0}, "method.options.weight is -1.0 but must be at least 0"),
        ("fmfp", {"rho": 0.0}, "method.options.rho is 0.0 but must be above 0"),
        ("fmfp", {"swa_from": 1.0}, "method.options.swa_from is 1.0 but must be in [0, 1)"),
        ("fmfp-tal", {"swa_lr": 0.0}, "method.options.swa_lr is 0.0 but must be above 0, or null"),
        ("fmfp-tal", {"warmup_epochs": -1}, "method.options.warmup_epochs is -1 but must be at least 0"),
        ("openmix", {}, "method.options.outliers is not set; name a folder of images that belong to none"),
        ("openmix", {"outliers": "uniform", "alpha": 0.0}, "method.options.alpha is 0.0 but must be above 0"),
        ("openmix", {"outliers": "uniform", "gamma": -1}, "method.options.gamma is -1.0 but must be above 0"),
        ("tal", {"variant": "new"}, "method.options.variant is 'new'; use 'paper' or 'released'"),
        ("tal", {"rho": 0.1}, "method.options.rho is not an option; there are method.options.variant, "),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(name: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared in the next line
        MethodConfig(name, options=options).check()
    assert str(caught.value).startswith(sentence)


def test_options_of_0_1_0_are_read_from_beside_the_name() -> None:
    method = Config.from_dict({"method": {"name": "tal", "label_smoothing": 0.1, "options": {}, **FLAT}}).method
    assert method == MethodConfig("tal", 0.1, dict(FLAT))
    saved = Config(method=method).to_dict()
    assert Config.from_dict(saved).method == method
    assert saved["method"].keys() == {"name", "label_smoothing", "options", "class_weight"}


@pytest.mark.parametrize("name", sorted(set(OPTIONS) - {"tal"}))
def test_options_of_tal_are_ignored_for_methods_without_them(name: str) -> None:
    own = {"openmix": {"outliers": "uniform"}}.get(name, {})
    method = Config.from_dict({"method": {"name": name, "options": dict(own), **FLAT}}).method
    kept = {key: value for key, value in FLAT.items() if name == "fmfp-tal" and key != "t_wrong"}
    assert method == MethodConfig(name, options={**own, **kept})
    assert "t_wrong" not in method.options


def test_two_values_of_one_option_are_refused() -> None:
    assert upgrade({"method": {"t_min": 3, "options": {"t_min": 3}}}) == {"method": {"options": {"t_min": 3}}}
    with pytest.raises(ValueError, match="method.t_min is 3 but method.options.t_min is 4; both name the same option"):
        upgrade({"method": {"t_min": 3, "options": {"t_min": 4}}})


def test_upgrade_leaves_other_values_and_its_argument_alone() -> None:
    values = {"method": {"name": "tal", "t_min": 3}, "epochs": 2}
    assert upgrade(values) == {"method": {"name": "tal", "options": {"t_min": 3}}, "epochs": 2}
    assert values == {"method": {"name": "tal", "t_min": 3}, "epochs": 2}
    assert upgrade({"method": 3}) == {"method": 3}  # which reading refuses


def test_dotted_names_follow_the_options() -> None:
    for name in TALOptions.__dataclass_fields__:
        assert option_path(f"method.{name}") == f"method.options.{name}"
    for name in ("method.name", "method.label_smoothing", "method.options.t_min", "optim.warmup_epochs"):
        assert option_path(name) == name


@pytest.mark.parametrize(("variant", "own"), [("paper", -1.0), ("released", 0.0)])
def test_the_default_threshold_is_the_variants_own(variant: str, own: float) -> None:
    assert option_values(TALOptions(variant=variant))["confidence_threshold"] == own  # type: ignore[arg-type]
    assert option_values(TALOptions(variant=variant, confidence_threshold=0.3))["confidence_threshold"] == 0.3  # type: ignore[arg-type]
    assert "confidence_threshold" not in option_values(OPTIONS["crl"]())
