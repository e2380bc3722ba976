"""Build script: the C++/CUDA extension is optional, everything else is declared in pyproject.toml."""

from __future__ import annotations

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["tal_fast", "tal_fast.*"]), "tal_fast.kernels"],
    package_dir={"tal_fast": "tal_fast", "tal_fast.kernels": "kernels"},
    package_data={"tal_fast": ["py.typed", "configs/*.yaml"]},
)
