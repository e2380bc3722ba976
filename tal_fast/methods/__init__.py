"""Training methods: one module each, found by its name (``fmfp-tal`` is in ``fmfp_tal.py``), and users' own."""

from __future__ import annotations

from importlib import import_module

from tal_fast.config.methods import method_names, package_methods
from tal_fast.config.schema import MethodConfig
from tal_fast.methods.base import Method, Step, Task
from tal_fast.scores.logits import SCORES
from tal_fast.utils.own_code import METHODS, in_file, installed, load

__all__ = ["Method", "Step", "Task", "build_method", "method_class", "method_names"]


def method_class(name: str) -> type[Method]:
    """Class of a method: the one in its module with that ``name``, or a user's own.

    Raises ValueError if there is none, or the user's is no method.
    """
    if in_file(name) or name in installed(METHODS).keys() - package_methods():
        own = load(name, METHODS)
        if not (isinstance(own, type) and issubclass(own, Method) and getattr(own, "score", None) in SCORES):
            raise ValueError(
                f"{name} is no method; it must be a subclass of tal_fast.methods.Method with a name, a score "
                f"({', '.join(SCORES)}) and forward"
            )
        return own
    if name not in method_names():
        raise ValueError(f"no method {name!r}; there are {', '.join(method_names())}")
    module = import_module(f"{__name__}.{name.replace('-', '_')}")
    for member in vars(module).values():
        if isinstance(member, type) and issubclass(member, Method) and getattr(member, "name", None) == name:
            return member
    raise AssertionError(f"{module.__file__} defines no Method with name = {name!r}")


def build_method(config: MethodConfig, task: Task) -> Method:
    """Build the method of a run; raises ValueError for an option outside its range."""
    config.check()
    kind = method_class(config.name)
    if task.class_weight is not None and not kind.takes_class_weight:
        raise ValueError(f"method.class_weight is set but {config.name} has no class weights; set it to none")
    return kind(config, task)
