"""Blocks of a network from its input to its head: which of them train, and how fast."""

from __future__ import annotations

from typing import Any

from torch import nn

from tal_fast.models.features import head_path


def block_numbers(network: nn.Module, stages: bool = False) -> dict[str, int]:
    """Number of the block of each parameter of a network from ``build_model``: 0 for the stem, the last for the head.

    Networks of timm say what their blocks are, and with ``stages`` what their stages are. Others are divided at their
    top level, or inside of the one module there that has layers inside. Single layers belong to the block before.
    """
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is not None:
        from timm.models import group_parameters

        return group_parameters(network, matcher(coarse=stages), reverse=True)
    head = head_path(network)
    parts = _parts(network, "", head)
    blocks = [part for part in parts if _is_block(network, part, head)]
    numbers = {name: 0 for name, _ in network.named_parameters()}
    number = 0
    for part in parts:
        number += not blocks or part in blocks or _holds(part[0], head)
        numbers |= {name: number for name in numbers if any(_holds(path, name) for path in part)}
    first = min(numbers.values())  # 1 where the stem has layers inside
    return {name: number - first for name, number in numbers.items()}


def _parts(network: nn.Module, path: str, head: str) -> list[list[str]]:
    """Paths of the parts of a module, in their order; elements of several lists at the same place are one part."""
    parts: dict[str, list[str]] = {}
    for name, child in network.get_submodule(path).named_children():
        elements = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        for index, element in elements:
            if any(True for _ in element.parameters()):
                parts.setdefault(index or name, []).append(".".join(filter(None, (path, name, index))))
    blocks = [part for part in parts.values() if _is_block(network, part, head)]
    if len(blocks) == 1 and len(blocks[0]) == 1:
        inside = _parts(network, blocks[0][0], head)
        return [inner for part in parts.values() for inner in (inside if part in blocks else [part])]
    return list(parts.values())


def _is_block(network: nn.Module, part: list[str], head: str) -> bool:
    """Whether a part has layers inside, and not the head."""
    inside = [child for path in part for child in network.get_submodule(path).children()]
    return any(True for child in inside for _ in child.parameters()) and not _holds(part[0], head)


def _holds(path: str, name: str) -> bool:
    """Whether a name is of the module at a path or inside of it."""
    return f"{name}.".startswith(f"{path}.")


def freeze(network: nn.Module, amount: int | str) -> None:
    """Freeze parameters of a network from ``build_model``: ``none``, ``backbone``, or the stem and so many stages.

    Raises:
        ValueError: there are fewer stages.
    """
    numbers = block_numbers(network, stages=True) if isinstance(amount, int) else {}
    stages = max(numbers.values(), default=1) - 1
    if isinstance(amount, int) and amount > stages:
        raise ValueError(
            f"model.freeze is {amount} but the network has {stages} stages before its head; use at most as many"
        )
    head = head_path(network)
    for name, parameter in network.named_parameters():
        if numbers[name] <= amount if isinstance(amount, int) else amount == "backbone" and not _holds(head, name):
            parameter.requires_grad_(False)


def is_frozen(module: nn.Module) -> bool:
    """Whether a module has parameters and none of them trains."""
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)
