"""What a run trains with: a module for each method, found by its name (``fmfp-tal`` is in ``fmfp_tal.py``)."""

from __future__ import annotations

from importlib import import_module

from tal_fast.config.schema import MethodConfig, method_names
from tal_fast.methods.base import Method, Step, Task

__all__ = ["Method", "Step", "Task", "build_method", "method_class", "method_names"]


def method_class(name: str) -> type[Method]:
    """The class of a method: the one in its module that has its name.

    Raises:
        ValueError: there is no such method.
    """
    if name not in method_names():
        raise ValueError(f"no method {name!r}; there are {', '.join(method_names())}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    for thing in vars(module).values():
        if isinstance(thing, type) and issubclass(thing, Method) and getattr(thing, "name", None) == name:
            return thing
    raise AssertionError(f"{module.__file__} defines no Method with name = {name!r}")


def build_method(config: MethodConfig, task: Task) -> Method:
    """The method of a run.

    Raises:
        ValueError: an option outside its range.
    """
    config.check()
    return method_class(config.name)(config, task)
