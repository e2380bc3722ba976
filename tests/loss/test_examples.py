"""Examples in the documentation of the loss."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from tal_fast.loss import functional, linear, module, queue, reference


@pytest.mark.parametrize("documented", [module, queue, functional, linear, reference], ids=lambda m: m.__name__)
def test_examples_run(documented: ModuleType) -> None:
    results = doctest.testmod(documented)
    assert results.attempted > 0
    assert results.failed == 0
