"""Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # for `import bench`, which is not installed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; none is here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fresh_random_inputs(request: pytest.FixtureRequest) -> None:
    """A different but repeatable seed for each test."""
    seed = sum(map(ord, request.node.nodeid)) * 7919
    torch.manual_seed(seed)


@pytest.fixture
def poison() -> object:
    """Memory that nothing has written reads as NaN, for tensors that C++ allocates too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
