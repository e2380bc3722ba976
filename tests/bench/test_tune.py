"""Choice of launch options: the fastest right ones, and the file they are written to."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bench import gpu, tune
from tal_fast import kernels
from tal_fast.kernels import distance, launch, layout
from tests.helpers.kernels import NAN_WARNINGS

INTERPRETED = pytest.mark.skipif(not kernels.is_available(torch.device("cpu"))[0], reason="needs Triton's interpreter")
pytestmark = NAN_WARNINGS  # of rows beyond the batch, which fill a tile
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


def trials(bench: gpu.Bench, rows: int) -> list[tune.Trial]:
    """Trials of the search, of the loss of rows on chip and of that of wide rows."""
    return [
        tune.search_trial(bench, 16, 900 * rows),
        tune.loss_trial(bench, rows, 100, torch.bfloat16),
        tune.loss_trial(bench, rows, 9000, torch.float32),
    ]


@INTERPRETED
@pytest.mark.parametrize("kind", range(3))
def test_each_candidate_is_another_launch(kind: int) -> None:
    each = trials(gpu.Bench(smoke=True), 300)[kind]
    launches = set()
    for options in each.candidates:
        recorded: list[launch.Launch] = []
        with tune.in_force(each.kernel, options), launch.replaced(recorded.append):
            each.compile()
        (one,) = [e for e in recorded if e.kernel.fn.__name__.startswith(each.kernel[:4])]
        launches.add((one.grid, *one.constants.items(), *one.options.items()))
    assert len(launches) == len(each.candidates) > 5


@INTERPRETED
@pytest.mark.parametrize("kind", range(3))
def test_candidates_are_right(kind: int) -> None:
    each = trials(gpu.Bench(smoke=True), 1)[kind]
    each = each._replace(candidates=each.candidates[::7])
    found = tune.try_all(each, time.monotonic() + 300, CPU)
    assert [options for options, _ in found] == [{}, *each.candidates]
    assert all(isinstance(t, float) for _, t in found), found


def test_launchers_read_the_file_of_the_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = {
        "loss_16bit": [{"at_most": 512, "logits": 16}, {"at_most": 1000}],
        "search": [{"at_most": 99, "queries": 8}],
    }
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "sm_0.json").write_text(tune.written(tuned))
    monkeypatch.setattr(launch, "__file__", str(tmp_path / "launch.py"))

    def laid_out(classes: int, dtype: torch.dtype, architecture: str) -> layout.LossConfig:
        return layout.loss_config(classes, dtype, 8, False, architecture)

    assert laid_out(300, torch.float16, "sm_0") != laid_out(300, torch.float16, "")
    for classes, dtype, architecture in (
        (513, torch.float16, "sm_0"),
        (300, torch.float32, "sm_0"),
        (300, torch.float16, "sm_1"),
    ):
        assert laid_out(classes, dtype, architecture) == laid_out(classes, dtype, "")
    assert distance.search_config(99, torch.float32, "sm_0").queries == 8
    assert distance.search_config(100, torch.float32, "sm_0") == distance.SearchConfig()


@pytest.mark.parametrize(
    "file", sorted(Path(launch.__file__).resolve().parent.glob("tuned/*.json")), ids=lambda f: f.stem
)
def test_committed_options_are_those_of_the_launchers(file: Path) -> None:
    for kernel, entries in json.loads(file.read_text()).items():
        sizes = [entry["at_most"] for entry in entries]
        assert sizes == sorted(sizes)
        for entry in entries:
            if kernel == "search":
                assert distance.search_config(entry["at_most"], torch.float32, file.stem)
            else:
                dtype = {"loss_16bit": torch.bfloat16, "loss_32bit": torch.float32}[kernel]
                config = layout.loss_config(entry["at_most"], dtype, 16 // dtype.itemsize, False, file.stem)
                assert config.width * config.chunks >= entry["at_most"] or not config.held
