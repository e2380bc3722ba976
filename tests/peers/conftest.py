"""Warnings in tests with other libraries: errors where this package causes them, else ignored."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore")
    config.addinivalue_line("filterwarnings", r"error:::tal_fast(\..*)?")
