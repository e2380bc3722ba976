"""Mixing of images: mixup, CutMix, RegMixup."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tal_fast import TALLoss
from tal_fast.config.schema import MixConfig, OptimConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.training.mixing import Mixer
from tal_fast.training.throughput import measure
from tal_fast.training.train_step import Update
from tal_fast.training.trainer import Trainer
from tal_fast.utils.distributed import Ranks
from tests.helpers.ranks import run_ranks
from tests.helpers.training import assert_same_end, config, final

REGMIXUP = {"mixup": 10.0, "weight": 1.0}
BOTH = {"mixup": 0.8, "cutmix": 1.0}


def images_and_labels(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(10, (rows,))
    labels[3] = IGNORED_LABEL
    return torch.rand(rows, 2, 9, 7), labels


def mix(step: int = 0, epoch: int = 0, rank: int = 0, rows: int = 12, **options: Any) -> tuple[Any, ...]:
    images, labels = images_and_labels(rows)
    return images, labels, Mixer(MixConfig(**options), 5, rank)(images, labels, torch.arange(rows), epoch, step)


def test_mixup_is_its_formula_with_a_permutation_of_the_batch() -> None:
    images, labels, (same, own, indices, mixed, pairs, share) = mix(**REGMIXUP)
    assert torch.equal(same, images)
    assert torch.equal(own, labels)
    assert torch.equal(indices, torch.arange(12))
    λ = float(share[0])
    assert torch.equal(share, torch.full((12,), λ))
    partners = ((mixed - λ * images) / (1 - λ)).flatten(1)
    order = torch.cdist(partners, images.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == list(range(12))
    torch.testing.assert_close(mixed, λ * images + (1 - λ) * images[order])
    expected = torch.stack([labels, labels[order]], 1)
    expected[(expected == IGNORED_LABEL).any(1)] = IGNORED_LABEL
    assert torch.equal(pairs, expected)
    assert (pairs == IGNORED_LABEL).all(1).sum() in (1, 2)  # the image without a label, and where it is the partner


def test_cutmix_replaces_a_rectangle_and_counts_its_pixels() -> None:
    areas = []
    for step in range(200):
        images, labels, (mixed, own, _, pairs, share) = mix(step, cutmix=1.0, rows=5)
        λ = float(share[0])
        changed = (mixed != images).any(1)
        moved = changed.flatten(1).any(1)
        if moved.any():
            areas.append(1 - λ)
            row = int(moved.nonzero()[0])
            height, width = changed[row].any(1).sum(), changed[row].any(0).sum()
            assert changed[row].sum() == height * width == round((1 - λ) * 63)
            partner = [r for r in range(5) if torch.equal(images[r][:, changed[row]], mixed[row][:, changed[row]])]
            ignored = IGNORED_LABEL in (labels[row], labels[partner[0]])
            assert pairs[row].tolist() == ([IGNORED_LABEL] * 2 if ignored else [labels[row], labels[partner[0]]])
            assert own[row] == pairs[row, 0 if λ >= 0.5 else 1]  # the label of the larger share
    assert len(areas) > 120
    assert 0.2 < np.mean(areas) < 0.45  # 1 - λ is uniform, but rectangles are cut off at the edges


def test_shares_and_kinds_are_drawn_as_documented() -> None:
    shares = np.array([float(mix(step, **REGMIXUP)[2][-1][0]) for step in range(1500)])
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / 84, rel=0.15)  # Beta(10, 10)
    mixer = Mixer(MixConfig(**BOTH, switch_prob=0.3), 1, 0)
    drawn = [mixer._draw(np.random.default_rng([step]), 9, 7) for step in range(1500)]
    assert np.mean([box is not None for _, box in drawn]) == pytest.approx(0.3, abs=0.04)
    assert {mix(2, 1, rank, **REGMIXUP)[2][-1][0].item() for rank in range(4)}.__len__() == 4  # ranks differ
    assert len({mix(step, epoch, **REGMIXUP)[2][-1][0].item() for step in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize("method", ["ce", "logitnorm", "fmfp"])
def test_the_loss_of_mixed_images_is_that_of_soft_labels(tmp_path: Path, method: str) -> None:
    options = config(tmp_path, method, mix=MixConfig(**BOTH), method_options={"label_smoothing": 0.1})
    trainer = Trainer(options)
    images, labels = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    labels[2] = IGNORED_LABEL
    mixed, own, indices, pairs, share = Mixer(options.mix, 5, 0)(images, labels, torch.arange(8), 0, 0)
    loss, sums = trainer.model(mixed, own, indices, pairs, share)
    logits = trainer.network(mixed)[0]
    if method == "logitnorm":
        logits = F.normalize(logits) / 0.04
    valid = pairs[:, 0] != IGNORED_LABEL
    hot = F.one_hot(pairs[valid], 10)
    target = share[0] * hot[:, 0] + (1 - share[0]) * hot[:, 1]
    expected = F.cross_entropy(logits[valid], 0.9 * target + 0.01)
    torch.testing.assert_close(loss, expected)
    assert sums[0] == valid.sum()


@pytest.mark.parametrize("method", ["tal", "crl", "ce"])
def test_regmixup_adds_the_mixed_images_to_the_clean_ones(tmp_path: Path, method: str) -> None:
    trainer = Trainer(config(tmp_path, method, mix=MixConfig(mixup=10, weight=0.7)))
    trainer.method.start_epoch(3)
    (batch,) = [batch for number, batch in enumerate(trainer.batches.epoch(0)) if number == 1]
    images, labels, indices, mixed, pairs, share = batch
    clean = next(step for number, step in enumerate(Trainer(config(tmp_path, method)).batches.epoch(0)) if number == 1)
    assert all(torch.equal(one, other) for one, other in zip(batch, clean, strict=False))  # the same images as without
    logits, features = trainer.network(torch.cat([images, mixed]))  # together, so that BatchNorm sees both
    mixed_loss = share[0] * F.cross_entropy(logits[32:], pairs[:, 0]) + (1 - share[0]) * F.cross_entropy(
        logits[32:], pairs[:, 1]
    )
    trainer.method.eval()  # keeps TAL's queue as it is
    expected = trainer.method(logits[:32], features[:32], labels, indices).loss + 0.7 * mixed_loss
    trainer.method.train()
    loss, sums = trainer.model(*batch)
    torch.testing.assert_close(loss, expected)
    assert sums[2] == (logits[:32].argmax(1) == labels).sum()
    if method == "tal":  # only clean images enter the queue
        assert len(trainer.method.loss_fn.queue) == sums[2]  # type: ignore[union-attr]


SURE_PLUS: dict[str, Any] = {
    "sam_radius": 0.2, "sam_sigma": 1.0, "ema_decay": 0.9, "ema_statistics": True,
}  # fmt: skip
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("ce", BOTH, {"optim": OptimConfig(lr=0.05, ema_decay=0.9)}),
    ("tal", {**BOTH, "weight": 1.0}, {"optim": OptimConfig(lr=0.05, accumulate=2)}),
    ("fmfp-tal", REGMIXUP, {}),
    ("tal", REGMIXUP, {"optim": OptimConfig(lr=0.05, **SURE_PLUS)}),
]


@pytest.mark.parametrize(
    ("method", "mixing", "options"), CASES, ids=["ce-ema", "tal-accumulate", "fmfp-tal", "sure-plus-tal"]
)
def test_a_mixing_run_resumes_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, mixing: dict[str, Any], options: dict[str, Any]
) -> None:
    recipe = {"augment": "randaugment", "color_jitter": (0.3, 0.3, 0.3, 0.1), "erase": 0.3, "repeats": 2}
    recipe |= {"sampling": "balanced"}

    def run(folder: str, **more: Any) -> Trainer:
        mix = MixConfig(**mixing)
        return Trainer(config(tmp_path / folder, method, epochs=2, mix=mix, data_options=recipe, **options, **more))

    run("straight").fit()
    parts, done, original = run("parts", checkpoint_every_steps=1), [0], Update.__call__

    def killed(self: Update, *args: Any) -> None:
        if done[0] == 8:
            raise KeyboardInterrupt
        original(self, *args)
        done[0] += 1

    with monkeypatch.context() as patch:
        patch.setattr(Update, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.fit()
    resumed = run("parts", resume="auto", checkpoint_every_steps=1)
    assert (resumed.state.epoch, resumed.state.step) == (1, 2)
    resumed.fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def train_two_ranks(rank: int, folder: Path) -> None:
    """Train with mixing at once, and in two parts, on one of two ranks."""
    ranks = Ranks(rank, 2, torch.device("cpu"))
    for method, mixing, optim in (("ce", BOTH, {}), ("tal", REGMIXUP, SURE_PLUS)):
        options: dict[str, Any] = {"epochs": 2, "mix": MixConfig(**mixing), "data_options": {"erase": 0.3}}
        options["optim"] = OptimConfig(lr=0.05, **optim)
        Trainer(config(folder / method / "straight", method, **options), ranks).fit()
        Trainer(config(folder / method / "parts", method, **options), ranks).fit(until=1)
        Trainer(config(folder / method / "parts", method, **options, resume="auto"), ranks).fit()


@pytest.mark.slow
def test_two_ranks_mix_and_resume_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(train_two_ranks, 2, tmp_path, tmp_path)
    for method in ("ce", "tal"):
        assert_same_end(tmp_path / method / "straight", tmp_path / method / "parts")


@pytest.mark.slow
def test_a_compiled_mixing_step_is_one_graph(tmp_path: Path) -> None:
    import torch._dynamo
    from torch._dynamo.utils import counters

    options = config(tmp_path, "tal", epochs=1, mix=MixConfig(**BOTH, weight=1.0), data_options={"channels": 3})
    options.model.compile = True
    torch._dynamo.reset()
    counters.clear()
    Trainer(options)._train_epoch(0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_the_cost_is_said_and_what_does_not_fit_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Trainer(config(tmp_path / "tal", epochs=1, mix=MixConfig(**BOTH, weight=1.0))).fit()
    assert "mixup (alpha 0.8) or CutMix (alpha 1) beside the images, weight 1: 64 images a step, not 32" in caplog.text
    assert final(tmp_path / "tal")[1]["epoch"] == 1
    for method in ("tal", "fmfp-tal", "crl"):
        sentence = f"so that there are mixed images alone, but {method} judges images of one class"
        with pytest.raises(ValueError, match=sentence):
            Trainer(config(tmp_path, method, mix=MixConfig(mixup=0.8)))
    with pytest.raises(ValueError, match="method.name is 'openmix', which mixes images by itself"):
        Trainer(config(tmp_path, "openmix", mix=MixConfig(**REGMIXUP), method_options={"outliers": "uniform:70"}))
    for options in ({"sampling": "balanced"}, {"repeats": 2}):
        with pytest.raises(ValueError, match="method.name is 'crl', which needs each image at most once an epoch"):
            Trainer(config(tmp_path, "crl", data_options=options))
    with pytest.raises(ValueError, match=r"labels are \(4, 10\), soft as those of mixed images, but TAL judges images"):
        TALLoss()(torch.randn(4, 10), torch.rand(4, 8), torch.full((4, 10), 0.1))


def test_throughput_compares_methods_that_may_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tal_fast.training.throughput.MAX_STEPS", 3)
    monkeypatch.setattr("tal_fast.training.throughput.WARM_UP_STEPS", 1)
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert measure(config(tmp_path, "ce", mix=MixConfig(**BOTH)), ranks)["step_ms"].keys() == {"ce", "tal"}
