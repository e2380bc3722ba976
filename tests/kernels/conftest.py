from __future__ import annotations

from collections.abc import Iterator

import pytest

from tal_fast.kernels import launch


@pytest.fixture(autouse=True)
def _plans_of_the_test_only() -> Iterator[None]:
    """Tests patch what launches are planned by."""
    launch.forget_plans()
    yield
    launch.forget_plans()
