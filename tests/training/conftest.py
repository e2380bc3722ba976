"""Fixtures of the training tests."""

from tests.helpers.training import one_thread  # noqa: F401
