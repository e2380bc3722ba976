"""Perturbation of the weights in sharpness-aware minimisation, and friendly SAM."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tal_fast.config.schema import OptimConfig
from tal_fast.training.sam import SAM
from tal_fast.training.trainer import Trainer
from tests.helpers.training import config, one_thread  # noqa: F401


def network(*tensors: Tensor) -> nn.Module:
    module = nn.ParameterList(map(nn.Parameter, tensors))
    module.register_buffer("count", torch.zeros(2))
    return module


def test_sam_on_a_quadratic() -> None:
    scales = torch.tensor([1.0, 10.0, 0.5])  # f(w) = Σ s w² / 2, whose gradient is s w
    (w,) = (module := network(torch.tensor([1.0, -2.0, 3.0]))).parameters()
    start, sam = w.detach().clone(), SAM(module, 0.3)
    (scales * w.square() / 2).sum().backward()
    sam.perturb()
    g = scales * start
    torch.testing.assert_close(w.detach(), start + 0.3 * g / g.norm())
    w.grad = None
    (scales * w.square() / 2).sum().backward()
    sam.restore()
    assert torch.equal(w.detach(), start)
    torch.testing.assert_close(w.grad, scales * (start + 0.3 * g / g.norm()))


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_weights_stay_where_a_scaled_gradient_is_infinite(sigma: float) -> None:
    module = network(torch.ones(2), torch.ones(3), torch.ones(1))
    first, second, _ = module.parameters()
    first.grad, second.grad = torch.tensor([1.0, float("inf")]), torch.ones(3)
    sam = SAM(module, 0.1, sigma, 0.5)
    sam.perturb(2.0)
    sam.finish_step()
    assert all(torch.equal(p.detach(), torch.ones_like(p)) for p in module.parameters())
    assert all(not tensor.any() for tensor in sam.state_dict().get("average", []))
    first.grad = torch.tensor([1.0, 2.0])
    sam.perturb(2.0)
    sam.finish_step()  # which is the first step
    if sigma:
        assert torch.equal(sam.state_dict()["average"][0], torch.tensor([0.5, 1.0]))


@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_friendly_sam_is_its_definition(factor: float) -> None:
    generator = torch.Generator().manual_seed(torch.seed() % 2**32)
    module = network(torch.randn(5, generator=generator), torch.randn(2, 3, generator=generator))
    weights = [p.detach().clone() for p in module.parameters()]
    sam, m = SAM(module, 0.2, 0.7, 0.8), None
    for _ in range(4):
        g = [torch.randn(w.shape, generator=generator) for w in weights]
        for p, gradient in zip(module.parameters(), g, strict=True):
            p.grad = factor * gradient
        sam.perturb(torch.tensor(factor))
        d = g if m is None else [a - 0.7 * b for a, b in zip(g, m, strict=True)]
        norm = torch.cat([x.flatten() for x in d]).norm()
        for p, w, x in zip(module.parameters(), weights, d, strict=True):
            torch.testing.assert_close(p.detach(), w + 0.2 * x / norm)
        for p in module.parameters():  # as DDP does, which keeps the gradients' memory
            p.grad.fill_(9.0)  # type: ignore[union-attr]
        sam.restore()
        sam.finish_step()
        assert all(torch.equal(p.detach(), w) for p, w in zip(module.parameters(), weights, strict=True))
        m = g if m is None else [0.8 * b + 0.2 * a for a, b in zip(g, m, strict=True)]
        torch.testing.assert_close(sam.state_dict()["average"], m)
        other = SAM(module, 0.2, 0.7, 0.8)
        other.load_state_dict(sam.state_dict())
        sam = other  # as after a resume


def test_a_failed_second_pass_leaves_the_average() -> None:
    module = network(torch.ones(3))
    (w,) = module.parameters()
    sam = SAM(module, 0.1, 1.0, 0.8, keep_buffers=True)
    w.grad = torch.ones(3)
    sam.perturb()
    module.count.add_(1)  # type: ignore[operator,union-attr]
    sam.restore()
    assert not sam.state_dict()["average"][0].any()
    assert torch.equal(module.count, torch.zeros(2))  # type: ignore[arg-type]


def test_a_step_of_the_trainer_is_friendly_sams(tmp_path: Path) -> None:
    optim = OptimConfig(lr=0.05, momentum=0.0, nesterov=False, weight_decay=0.0, sam_radius=0.2, sam_sigma=1.0)
    trainer = Trainer(config(tmp_path, "ce", optim=optim))
    network = copy.deepcopy(trainer.network).train()
    trainer.model.train()
    m: list[Tensor] | None = None
    for images, labels, indices in list(trainer.batches.epoch(0))[:3]:
        trainer.train_step((images, labels, indices), 0.05)
        weights = [p.detach().clone() for p in network.parameters()]

        def gradient(module: nn.Module, images: Tensor = images, labels: Tensor = labels) -> list[Tensor]:
            return list(torch.autograd.grad(F.cross_entropy(module(images)[0], labels), list(module.parameters())))

        g = gradient(network)  # which updates BatchNorm's statistics, and the second does not
        d = g if m is None else [a - b for a, b in zip(g, m, strict=True)]
        m = g if m is None else [0.8 * b + 0.2 * a for a, b in zip(g, m, strict=True)]
        norm = torch.cat([x.flatten() for x in d]).norm()
        beside = copy.deepcopy(network)
        with torch.no_grad():
            for p, x in zip(beside.parameters(), d, strict=True):
                p.add_(0.2 * x / norm)
            for p, w, x in zip(network.parameters(), weights, gradient_of(beside, gradient), strict=True):
                p.copy_(w - 0.05 * x)
        wanted = network.state_dict()
        for name, value in trainer.network.state_dict().items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-5, msg=name)


def gradient_of(module: nn.Module, gradient: object) -> list[Tensor]:
    with torch.enable_grad():
        return gradient(module)  # type: ignore[operator]


def test_a_method_with_its_own_radius_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.sam_radius is 0\.1 but fmfp has a radius of its own; set it to null"):
        Trainer(config(tmp_path, "fmfp", optim=OptimConfig(sam_radius=0.1)))


@pytest.mark.parametrize("sigmas", [(1.0, 0.0), (0.0, 1.0)])
def test_a_resumed_run_may_change_sigma(tmp_path: Path, sigmas: tuple[float, float]) -> None:
    for until, sigma in zip((1, 2), sigmas, strict=True):
        run = config(tmp_path / "x", "ce", epochs=2, optim=OptimConfig(sam_radius=0.1, sam_sigma=sigma), resume="auto")
        run.allow = ["optim.sam_sigma"]
        trainer = Trainer(run)
        trainer.fit(until=until)
    assert trainer.state.epoch == 2
    assert bool(trainer.state.sam.state_dict()) == bool(sigmas[1])
