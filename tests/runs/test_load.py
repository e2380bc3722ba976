"""Loading a trained model from a run folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tal_fast.runs.checkpoint import FOLDER
from tal_fast.runs.load import load_run
from tal_fast.training.trainer import Trainer
from tests.helpers.images import make_folder
from tests.helpers.training import config, one_thread  # noqa: F401


def test_a_loaded_run_has_the_network_in_eval_mode_and_the_data(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "openmix", method_options={"outliers": "uniform:70"}))
    trainer.save(best=True)
    assert trainer._writer.finish() is None
    run = load_run(tmp_path)
    assert (run.method, run.epoch, run.checkpoint.name) == ("openmix", 0, "best.pt")
    assert not run.model.training
    images, _, _ = next(iter(run.data.loader("val", batch_size=3)))
    logits, features = run.model(images)
    assert logits.shape == (3, 10)  # without the outlier class
    assert features.shape == (3, 32)
    run = load_run(tmp_path, "last")
    run.class_names = ("a", "b")
    with pytest.raises(ValueError, match="the data have classes 0, 1, .* but the model was trained on a, b"):
        _ = run.data


@pytest.mark.parametrize("option", [{"split": 0.3}, {"holdout": 5}])
def test_validation_images_chosen_from_a_changed_folder_are_refused(tmp_path: Path, option: dict[str, float]) -> None:
    root = make_folder(tmp_path / "data") / ("train" if "split" in option else "")
    data = {"dataset": "folder", "root": str(root), **option}
    trainer = Trainer(config(tmp_path / "run", data_options=data, batch_size=4))
    trainer.save(best=True)
    assert trainer._writer.finish() is None
    assert len(load_run(tmp_path / "run").data.split("val")) > 0
    image = min(root.rglob("cat/0.png"))
    image.with_name("added.png").write_bytes(image.read_bytes())
    with pytest.raises(ValueError, match=f"data.{min(option)} may choose validation images"):
        _ = load_run(tmp_path / "run").data


def test_missing_runs_and_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"none holds no run of tal_fast.train; train one first with .* --output .*none",
    ):
        load_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"holds no run of tal_fast.train"):
        load_run(tmp_path)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / "last.pt").touch()
    with pytest.raises(ValueError, match=r"there is no checkpoint .*best.pt; use --checkpoint last$"):
        load_run(tmp_path)
    (tmp_path / FOLDER / "last.pt").rename(tmp_path / FOLDER / "best.pt")
    with pytest.raises(ValueError, match=r"best.pt cannot be read .* or not one$"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="checkpoint is 'first'; use 'best' or 'last'"):
        load_run(tmp_path, "first")  # type: ignore[arg-type]
