"""Cache of the data tests."""

import pytest


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAL_FAST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
