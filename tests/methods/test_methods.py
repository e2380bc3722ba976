"""Each method's step against an independent formula; that each trains and resumes to the bit."""

from __future__ import annotations

import copy
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tal_fast.config.schema import MethodConfig, OptimConfig
from tal_fast.data.loader import IGNORED_LABEL
from tal_fast.methods import Task, build_method, method_class, method_names
from tal_fast.methods.base import CONFIDENCES
from tal_fast.models import build_model, keep_classes
from tal_fast.runs import checkpoint
from tal_fast.runs.load import load_run
from tal_fast.scores.logits import SCORES
from tal_fast.training.sam import Ascent
from tal_fast.training.trainer import Trainer
from tal_fast.training.weight_averaging import StochasticAverage
from tests.helpers.training import assert_same_end, config, one_thread, step_of  # noqa: F401
from tests.helpers.training import method as make_method

OPTIONS: dict[str, dict[str, Any]] = {"openmix": {"outliers": "uniform:70"}, "fmfp": {"rho": 0.1}}
"""Of methods that need some, or that would hardly differ from others in so short a run."""


def batch(rows: int = 9, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(classes, (rows,))
    labels[3] = IGNORED_LABEL
    return 3 * torch.randn(rows, classes), torch.rand(rows, 6), labels


def test_methods_are_found_by_their_modules_names() -> None:
    assert {"ce", "crl", "fmfp", "fmfp-tal", "logitnorm", "openmix", "tal"} <= set(method_names())
    for name in method_names():
        assert method_class(name).name == name
        assert method_class(name).score in SCORES
    with pytest.raises(ValueError, match="method.name is 'cee'; use 'ce' or 'crl' or "):
        MethodConfig("cee").check()


@pytest.mark.parametrize("score", sorted(SCORES))
def test_confidences_on_the_device_are_the_scores(score: str) -> None:
    logits = 20 * torch.randn(50, 7, dtype=torch.float64)
    np.testing.assert_allclose(CONFIDENCES[score](logits).numpy(), SCORES[score](logits), rtol=1e-9, atol=1e-14)
    assert set(CONFIDENCES) == set(SCORES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ce", {"tau": 1.0}, "method.options has 'tau' but ce has no options of its own"),
        ("logitnorm", {"tua": 1.0}, "method.options.tua is not an option; there are method.options.tau"),
        ("logitnorm", {"tau": 0.0}, "method.options.tau is 0.0 but must be above 0"),
        ("logitnorm", {"tau": "cold"}, "method.options.tau is 'cold' but must be float"),
        ("crl", {"weight": -1.0}, "method.options.weight is -1.0 but must be at least 0"),
        ("fmfp", {"rho": 0.0}, "method.options.rho is 0.0 but must be above 0"),
        ("fmfp", {"swa_from": 1.0}, r"method.options.swa_from is 1.0 but must be in \[0, 1\)"),
        ("fmfp-tal", {"swa_lr": 0.0}, "method.options.swa_lr is 0.0 but must be above 0"),
        ("openmix", {}, "method.options.outliers is not set; name a folder of images that belong to none"),
        ("openmix", {"outliers": "uniform", "alpha": 0.0}, "method.options.alpha is 0.0 but must be above 0"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_method(MethodConfig(name, options=options))


# ---- Steps ----------------------------------------------------------------------------------------------------


def test_ce_is_cross_entropy() -> None:
    logits, features, labels = batch()
    loss, samples = step_of(make_method(MethodConfig("ce", label_smoothing=0.1)), logits, features, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=0.1))
    assert samples == {}
    ce = make_method(MethodConfig("ce"))
    nothing = step_of(ce, logits.requires_grad_(), features, torch.full_like(labels, IGNORED_LABEL)).loss
    nothing.backward()
    assert float(nothing.detach()) == float(logits.grad.abs().sum()) == 0  # type: ignore[union-attr]
    assert step_of(ce, logits.detach().bfloat16(), features, labels).loss.dtype == torch.float32


def test_logitnorm_is_its_definition() -> None:
    logits, features, labels = batch()
    method = make_method(MethodConfig("logitnorm", options={"tau": 0.3}))
    rows = []
    for z, y in zip(logits.double().numpy(), labels.tolist(), strict=True):
        scaled = z / (0.3 * (np.sqrt((z**2).sum()) + 1e-7))
        if y != IGNORED_LABEL:
            rows.append(np.log(np.exp(scaled).sum()) - scaled[y])
    assert float(step_of(method, logits, features, labels).loss) == pytest.approx(np.mean(rows), rel=1e-5)


def test_crl_orders_confidences_as_often_as_samples_were_right() -> None:
    method = make_method(MethodConfig("crl", options={"weight": 0.7}), images=20)
    features = torch.rand(6, 3)
    right = np.zeros(20)  # times that each image was predicted right
    for epoch in range(3):
        method.start_epoch(epoch)
        for first in range(0, 18, 6):
            indices = torch.tensor([(7 * i) % 19 for i in range(first, first + 6)])
            logits, labels = 2 * torch.randn(6, 4), torch.randint(4, (6,))
            loss = method(logits, features, labels, indices).loss
            often = (right - right.min()) / max(1, max(1, epoch) - right.min())
            kappa = logits.softmax(1).amax(1).double().numpy()
            want = 0.0
            for at in range(6):
                i, j = int(indices[at]), int(indices[(at + 1) % 6])
                sign, margin = np.sign(often[i] - often[j]), abs(often[i] - often[j])
                want += max(0.0, -sign * (kappa[at] - kappa[(at + 1) % 6]) + margin) / 6
            assert float(loss) == pytest.approx(float(F.cross_entropy(logits, labels)) + 0.7 * want, rel=1e-5)
            seen = (logits.argmax(1) == labels).numpy()
            for at in range(6):
                right_now = indices[at]
                method._now_by_hand = getattr(method, "_now_by_hand", {}) | {int(right_now): bool(seen[at])}
        for image, was_right in method._now_by_hand.items():
            right[image] += was_right
        method._now_by_hand = {}
        method.finish_epoch()
        np.testing.assert_array_equal(method.get_extra_state()["times_right"].numpy(), right)


def test_crl_leaves_out_rows_without_an_image() -> None:
    method = make_method(MethodConfig("crl"), images=4)
    method.set_extra_state({"times_right": torch.tensor([3.0, 0, 2, 1]), "right_now": torch.zeros(4), "epochs": 3})
    method.start_epoch(3)
    logits, features, labels = torch.randn(4, 5), torch.rand(4, 3), torch.tensor([0, IGNORED_LABEL, 2, 3])
    loss = method(logits, features, labels, torch.arange(4)).loss
    kappa = logits.softmax(1).amax(1)
    pairs = [(2, 3, 1 / 3), (3, 0, -2 / 3)]  # (0, 1) and (1, 2) have a row without an image
    ranking = torch.stack([torch.relu(abs(d) - np.sign(d) * (kappa[i] - kappa[j])) for i, j, d in pairs]).mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels) + ranking)
    assert method.get_extra_state()["right_now"][1] == 0


def test_openmix_labels_mixtures_with_both_classes() -> None:
    method = make_method(MethodConfig("openmix", options={"outliers": "uniform", "gamma": 0.6}), classes=4)
    images, outliers = torch.rand(9, 1, 5, 5), torch.rand(9, 1, 5, 5)
    inputs = method.inputs(images, outliers)
    assert torch.equal(inputs[:9], images)
    share = float(((inputs[9:] - outliers) / (images - outliers)).median())
    torch.testing.assert_close(inputs[9:], share * images + (1 - share) * outliers)
    logits, features, labels = torch.randn(18, 5), torch.rand(18, 6), batch()[2]
    valid = labels != IGNORED_LABEL
    target = torch.zeros(9, 5)
    target[valid, labels[valid]] = share
    target[valid, 4] = 1 - share
    mixed = -(target * logits[9:].log_softmax(1)).sum(1)[valid].mean()
    torch.testing.assert_close(
        step_of(method, logits, features, labels).loss, F.cross_entropy(logits[:9], labels) + 0.6 * mixed
    )
    shares = [float(method.inputs(torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))[1]) for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    assert np.var(shares) == pytest.approx(1 / 84, rel=0.15)  # of Beta(10, 10)


def test_the_extra_class_is_gone_after_training(tmp_path: Path) -> None:
    model = build_model(config(tmp_path).model, 11, 1, 8).eval()
    images = torch.randn(3, 1, 8, 8)
    logits, features = model(images)
    keep_classes(model, 10)
    torch.testing.assert_close(model(images)[0], logits[:, :10])
    torch.testing.assert_close(model(images)[1], features)


# ---- Flat minima ----------------------------------------------------------------------------------------------


def test_sam_on_a_quadratic() -> None:
    scales = torch.tensor([1.0, 10.0, 0.5])  # f(w) = Σ s w² / 2, whose gradient is s w
    w = nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    start, ascent = w.detach().clone(), Ascent([w], 0.3)
    (scales * w.square() / 2).sum().backward()
    ascent.climb()
    g = scales * start
    torch.testing.assert_close(w.detach(), start + 0.3 * g / g.norm())
    w.grad = None
    (scales * w.square() / 2).sum().backward()
    ascent.back()
    assert torch.equal(w.detach(), start)
    torch.testing.assert_close(w.grad, scales * (start + 0.3 * g / g.norm()))


def test_sam_stays_where_a_scalers_gradient_is_infinite() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, float("inf")]), torch.ones(3)
    ascent = Ascent(parameters, 0.1)
    ascent.climb()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in parameters)


def test_swa_is_the_mean_of_the_weights_with_statistics_of_its_own() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    average = StochasticAverage(network, first_epoch=2)
    images = [torch.randn(16, 3) + 2 for _ in range(3)]
    weights = []
    for epoch in range(1, 6):
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p))
        if epoch > 2:
            weights.append([p.detach().clone() for p in network.parameters()])
        if epoch == 4:  # as when resumed: the weights alone are kept
            kept = copy.deepcopy(average.network.state_dict())
            average = StochasticAverage(network, first_epoch=2)
            average.network.load_state_dict(kept)
        average.update(network, epoch, iter(images))
        assert average.epochs_averaged(epoch) == max(0, epoch - 2)
    for got, *parts in zip(average.network.parameters(), *weights, strict=True):
        torch.testing.assert_close(got, torch.stack(parts).mean(0))
    hidden = torch.cat(images) @ average.network[0].weight.T + average.network[0].bias  # type: ignore[index]
    norm = average.network[1]  # type: ignore[index]
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([h.var(0) for h in hidden.split(16)]).mean(0))
    assert norm.momentum == 0.1
    assert not average.network.training


def test_fmfp_steps_by_the_gradient_at_the_top(tmp_path: Path) -> None:
    optim = OptimConfig(lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0, accumulate=2)
    trainer = Trainer(config(tmp_path, "fmfp", optim=optim, method_options={"options": {"rho": 0.2}}))
    trainer.model.eval()  # BatchNorm by its running statistics, so that the parts of a batch are independent
    network = copy.deepcopy(trainer.network)
    images, labels, indices = next(trainer.batches(0))
    trainer._train_step((images, labels, indices), 0.05)

    def gradient(of: nn.Module) -> list[torch.Tensor]:
        return list(torch.autograd.grad(F.cross_entropy(of(images)[0], labels), list(of.parameters())))

    low = [p.detach().clone() for p in network.parameters()]
    up = gradient(network)
    norm = torch.sqrt(sum(g.square().sum() for g in up))  # type: ignore[arg-type]
    with torch.no_grad():
        for p, g in zip(network.parameters(), up, strict=True):
            p.add_(0.2 * g / norm)
    for p, start, g in zip(trainer.network.parameters(), low, gradient(network), strict=True):
        torch.testing.assert_close(p.detach(), start - 0.05 * g, rtol=1e-4, atol=1e-6)


def test_fmfp_tal_pushes_once_a_step_and_leaves_wrong_samples_their_temperature(tmp_path: Path) -> None:
    trainer = Trainer(config(tmp_path, "fmfp-tal", method_options={"t_wrong": 20.0, "confidence_threshold": -1.0}))
    loss_fn = trainer.method.loss_fn
    assert loss_fn.options.t_wrong is None
    trainer.model.train()
    pushed = []
    for batch in list(trainer.batches(0))[:3]:
        before = len(loss_fn.queue)
        trainer._train_step(batch, 0.01)
        pushed.append(len(loss_fn.queue) - before)
    right = trainer.sums.total[2]  # of the first pass, at almost the same weights
    assert abs(sum(pushed) - float(right)) <= 0.3 * float(right) + 3


@pytest.mark.parametrize("name", ["fmfp", "fmfp-tal"])
def test_weights_are_averaged_from_six_tenths_on(tmp_path: Path, name: str) -> None:
    trainer = Trainer(config(tmp_path, name, epochs=5))
    weights, rates = [], []
    step = trainer._train_step

    def noting(batch: Any, rate: float) -> None:
        rates.append(rate)
        step(batch, rate)

    trainer._train_step = noting  # type: ignore[method-assign]
    for epoch in range(1, 6):
        trainer.fit(until=epoch)
        weights.append([p.detach().clone() for p in trainer.network.parameters()])
        content = checkpoint.load(tmp_path / "checkpoints" / "last.pt")
        assert (content["average"] is not None) == (epoch > 3)
    run = load_run(tmp_path, "last")
    for got, *parts in zip(run.model.parameters(), *weights[3:], strict=True):
        torch.testing.assert_close(got, torch.stack(parts).mean(0))
    assert rates[-1] == pytest.approx(0.025)  # half the peak
    assert trainer.best["epoch"] >= 4
    accuracy = trainer.history[-1]["val_accuracy"]
    right = sum(int((run.model(x)[0].argmax(1) == y).sum()) for x, y, _ in run.data.loader("val", batch_size=128))
    assert right / 896 == pytest.approx(accuracy)


def test_two_kinds_of_average_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim.ema_decay is 0.9 but fmfp averages the weights itself"):
        Trainer(config(tmp_path, "fmfp", optim=OptimConfig(ema_decay=0.9)))


# ---- Runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", method_names())
def test_each_method_trains_and_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    def made(folder: str, **options: Any) -> Any:
        method_options = {"options": OPTIONS.get(name, {})}
        return config(tmp_path / folder, name, epochs=3, method_options=method_options, **options)

    straight = Trainer(made("straight"))
    straight.fit()
    losses = [row["train_loss"] for row in straight.history]
    assert np.isfinite(losses).all()
    parts = Trainer(made("parts", checkpoint_every_steps=2))
    seen: list[int] = []
    step = parts._train_step

    def interrupted(batch: Any, rate: float) -> None:
        if len(seen) == 15:  # in the third epoch, after its second and before its fourth step
            raise KeyboardInterrupt
        seen.append(1)
        step(batch, rate)

    parts._train_step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        parts.fit()
    resumed = Trainer(made("parts", resume="auto", checkpoint_every_steps=2))
    assert (resumed.epoch, resumed.step) == (2, 2)
    resumed.fit()
    assert_same_end(tmp_path / "straight", tmp_path / "parts")


def test_crl_counts_anew_with_other_images(tmp_path: Path) -> None:
    made = build_method(MethodConfig("crl"), Task(3, 5, 40, 0.1))
    state = made.state_dict()
    state["_extra_state"] |= {"times_right": torch.ones(41), "right_now": torch.ones(41), "epochs": 2}
    with pytest.warns(UserWarning, match="CRL's counts are of 41 training images, not 40: it counts anew"):
        made.load_state_dict(state)
    assert made.get_extra_state()["epochs"] == 0
    assert not made.get_extra_state()["times_right"].any()


def test_a_method_that_learns_what_no_optimizer_steps_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build_method(MethodConfig("ce"), Task(3, 10, 40, 0.1))
    made.scale = torch.nn.Parameter(torch.ones(()))
    monkeypatch.setattr("tal_fast.training.trainer.build_method", lambda *_: made)
    with pytest.raises(ValueError, match="the method ce has the parameter scale, which no optimizer steps"):
        Trainer(config(tmp_path, "ce"))


def test_too_few_outliers_are_named(tmp_path: Path) -> None:
    options = {"options": {"outliers": "uniform:50"}}
    with pytest.raises(ValueError, match="the outliers uniform:50: a step takes 64 images .* there are only 50"):
        Trainer(config(tmp_path, "openmix", batch_size=64, method_options=options))


WORKER = """
import os
import sys
import torch
import torch.distributed as dist
from tal_fast.config.schema import MethodConfig, OptimConfig
from tal_fast.utils.distributed import Ranks
from tal_fast.training.trainer import Trainer
sys.path.insert(0, sys.argv[1])
from tests.helpers import training
torch.set_num_threads(1)
ranks = Ranks.start("cpu")
made = training.config(sys.argv[2], sys.argv[3], epochs=4, method_options={"options": eval(sys.argv[4])})
trainer = Trainer(made, ranks)
trainer.fit()
state = torch.cat([p.detach().flatten() for p in trainer.network.parameters()])
if trainer.average is not None:
    state = torch.cat([state, *[t.flatten().float() for t in trainer.average.network.state_dict().values()]])
extra = trainer.method.state_dict().get("_extra_state")
if extra is not None:
    state = torch.cat([state, extra["times_right"]])
    assert 0 < extra["times_right"].max() <= 4, "an image that two ranks count would have more"
states = [torch.empty_like(state) for _ in range(2)]
dist.all_gather(states, state)
assert torch.equal(*states)
ranks.stop()
print("same", flush=True)
os._exit(0)  # as tal_fast.utils.process does
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["crl", "fmfp", "openmix"])
def test_two_ranks_stay_one_model(tmp_path: Path, name: str) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    words = [str(Path(__file__).parents[2]), str(tmp_path / "run"), name, repr(OPTIONS.get(name, {}))]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *words],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same") == 2


def test_crl_of_other_ranks_forgets_the_unfinished_epoch() -> None:
    method = make_method(MethodConfig("crl"), images=3)
    state = {"_extra_state": {"times_right": torch.ones(3), "right_now": torch.ones(3), "epochs": 1}}
    method.load_state_dict(method.reshard([state, state], 0, 1))
    extra = method.get_extra_state()
    assert (extra["times_right"].tolist(), extra["right_now"].tolist()) == ([1, 1, 1], [0, 0, 0])


def test_the_documented_method_takes_one_file_and_one_test(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "adding-a-method.md").read_text()
    method, test = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    (command,) = re.findall(r"^```sh\npython (.*?)\n```", text, re.DOTALL | re.MULTILINE)
    shutil.copytree(root / "tal_fast", tmp_path / "tal_fast")
    shutil.copytree(root / "kernels", tmp_path / "tal_fast" / "kernels")
    (tmp_path / "tal_fast" / "methods" / "focal.py").write_text(method)
    (tmp_path / "test_focal.py").write_text(test)
    small = "--epochs 1 --data.train_limit 128 --data.loader torch --data.workers 0 --logger none --device cpu"
    for words in (f"-m pytest -q -p no:cacheprovider {tmp_path / 'test_focal.py'}", f"{command} {small}"):
        done = subprocess.run(
            [sys.executable, *words.split()],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs" / "focal" / "checkpoints" / "last.pt").exists()
