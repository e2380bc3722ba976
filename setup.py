"""Build script of the optional C++ extension; pyproject.toml declares everything else.

The extension is built against the installed torch, so install with ``--no-build-isolation``. It is left out, with one
line that gives the reason, when TAL_FAST_NO_EXTENSION=1 is set, torch cannot be imported or nothing compiles it; the
package then runs on plain PyTorch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import setuptools
from setuptools import Command, Extension, find_packages, setup

# 65.5 in a fresh environment of Python 3.10 or 3.11. bench/gpu.sh builds the extension alone, where no such file is.
if Path("pyproject.toml").exists() and int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(
        f"tal-fast: setuptools {setuptools.__version__} is too old to read pyproject.toml; "
        "run: pip install --upgrade 'setuptools>=77'"
    )

# Contraction to fused multiply-add is off so that every instruction set gives the same bits; see csrc/simd.h.
CXX_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def say(line: str) -> None:
    print(f"tal-fast: {line}", file=sys.stderr, flush=True)


def make_extension() -> Extension:
    from torch.utils.cpp_extension import CppExtension

    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    return CppExtension(
        "tal_fast._C",
        ["csrc/ops.cpp", "csrc/ops_cpu.cpp", "csrc/step_cpu.cpp", "csrc/kernels_cpu.cpp"],
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=CXX_FLAGS + openmp,
        extra_link_args=openmp,
        py_limited_api=True,
    )


def extension_and_command() -> tuple[list[Extension], dict[str, type[Command]]]:
    if os.environ.get("TAL_FAST_NO_EXTENSION") == "1":
        say("TAL_FAST_NO_EXTENSION=1: the C++ extension is left out")
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        say(f"torch is not importable here ({error}): the C++ extension is left out; use --no-build-isolation")
        return [], {}

    class OptionalBuild(BuildExtension):
        """Extension build whose failure does not stop the install."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                line = (str(error).strip() or type(error).__name__).splitlines()[0]
                say(f"the C++ extension does not compile and is left out: {line}")
                self.extensions = self.distribution.ext_modules = []

    return [make_extension()], {"build_ext": OptionalBuild}


ext_modules, cmdclass = extension_and_command()
setup(
    packages=[*find_packages(include=["tal_fast", "tal_fast.*"]), "tal_fast.kernels"],
    package_dir={"tal_fast": "tal_fast", "tal_fast.kernels": "kernels"},
    package_data={
        "tal_fast": ["py.typed"],
        "tal_fast.config": ["presets/*.yaml"],
        "tal_fast.evaluation": ["card.md.j2"],
        "tal_fast.evaluation.html": ["page.*"],
        "tal_fast.kernels": ["tuned/*.json"],
    },
    include_package_data=False,  # package_data names everything
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
