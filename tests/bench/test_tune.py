"""Choice of launch options: the fastest right ones, and the file they are written to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from tal_fast.kernels import launch

CPU = torch.device("cpu")


def trial(times: dict[int, float | str]) -> tune.Trial:
    """A kernel whose time, or error, depends on the number of warps; 0 is that of the built-in rules."""

    def prepare() -> Callable[[], float]:
        def measure() -> float:
            result = times[launch.tuned_options("loss_16bit", 1000, "any").get("num_warps", 0)]
            if isinstance(result, str):
                raise AssertionError(result)
            return result

        return measure

    candidates = [{"num_warps": w} for w in times if w]
    return tune.Trial("loss_16bit", 1000, "2 x 1,000", candidates, prepare, lambda: None)


def test_fastest_right_options_are_chosen() -> None:
    wrong = "the gradient is off"
    found = tune.try_all(trial({0: 2.0, 4: 1.5, 8: wrong, 16: 1.0}), time.monotonic() + 60, CPU)
    assert found == [
        ({}, 2.0), ({"num_warps": 4}, 1.5), ({"num_warps": 8}, f"AssertionError: {wrong}"), ({"num_warps": 16}, 1.0),
    ]  # fmt: skip
    assert tune.chosen(found) == {"num_warps": 16}
    assert tune.chosen(found[:1]) == {}
    assert tune.chosen([({}, wrong), ({"num_warps": 4}, wrong)]) == {}
    assert tune.chosen([({}, wrong), ({"num_warps": 4}, 3.0)]) == {"num_warps": 4}


def test_a_gain_within_the_noise_leaves_the_built_in_rules() -> None:
    found = tune.try_all(trial({0: 1.0, 4: 1.0 - 0.9 * tune.GAIN}), time.monotonic() + 60, CPU)
    assert tune.chosen(found) == {}
    found = tune.try_all(trial({0: 1.0, 4: 1.0 - 1.1 * tune.GAIN}), time.monotonic() + 60, CPU)
    assert tune.chosen(found) == {"num_warps": 4}


def test_nothing_is_tried_after_the_end() -> None:
    assert tune.try_all(trial({0: 1.0, 4: 0.5}), time.monotonic() - 1, CPU) == []


def test_entries_are_in_order_and_merged_and_end_with_the_last_options() -> None:
    four, eight = {"num_warps": 4}, {"num_warps": 8}
    choices = {8192: eight, 100: four, 512: four, 1000: {}, 4096: {}, 21_841: eight, 131_072: {}}
    assert tune.entries_of(choices) == [
        {"at_most": 512, **four}, {"at_most": 4096}, {"at_most": 21_841, **eight},
    ]  # fmt: skip
    assert tune.entries_of({100: {}}) == []


def test_file_has_an_entry_a_line() -> None:
    tuned = {"search": [{"at_most": 5, "queries": 4}], "loss_16bit": [{"at_most": 1}, {"at_most": 2, "rows": 2}]}
    text = tune.written(tuned)
    assert json.loads(text) == tuned
    assert text.count("at_most") == sum("at_most" in line for line in text.splitlines()) == 3
