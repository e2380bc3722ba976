"""Build script of the optional C++/CUDA extension; pyproject.toml declares everything else.

The extension is built against the installed torch, so install with ``--no-build-isolation``. It is left out, with one
line that gives the reason, when TAL_FAST_NO_EXTENSION=1 is set, torch cannot be imported or nothing compiles it; the
package then runs on plain PyTorch. The CUDA sources are compiled too when nvcc and torch have the same CUDA version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
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
NVCC_FLAGS = ["-O3"]


def say(line: str) -> None:
    print(f"tal-fast: {line}", file=sys.stderr, flush=True)


def cuda_toolkit() -> tuple[Path, int] | None:
    """Folder and major version of the CUDA toolkit, from nvcc's own output: the nvcc on PATH may be a wrapper."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home, "bin")) if home else None)
    if nvcc is None:
        return None
    try:
        dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return None
    top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    release = re.search(r"release (\d+)\.", version.stdout)
    if top is None or release is None:
        return None
    return Path(top.group(1)).resolve(), int(release.group(1))


def cuda_problem() -> str | None:
    """Reason to leave the CUDA sources out, or None (and CUDA_HOME set) when they can be compiled."""
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    toolkit = cuda_toolkit()
    if toolkit is None:
        return "no nvcc was found"
    home, major = toolkit
    if major != int(torch.version.cuda.split(".")[0]):
        return f"nvcc has CUDA {major} but torch has CUDA {torch.version.cuda}"
    os.environ["CUDA_HOME"] = str(home)
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        # Without a GPU to ask: A100, H100 and B200 (supported by nvcc from CUDA 12.8 on).
        recent = tuple(map(int, torch.version.cuda.split(".")[:2])) >= (12, 8)
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0" if recent else "8.0;9.0"
    return None


def make_extension(*, with_cuda: bool) -> Extension:
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    sources = ["csrc/ops.cpp", "csrc/ops_cpu.cpp", "csrc/step_cpu.cpp", "csrc/kernels_cpu.cpp"]
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []
    flags = {"cxx": CXX_FLAGS + openmp}
    options = {
        "include_dirs": [str(Path("csrc").resolve())],
        "extra_compile_args": flags,
        "extra_link_args": openmp,
        "py_limited_api": True,
    }
    if not with_cuda:
        return CppExtension("tal_fast._C", sources, **options)
    import torch

    # pip's torch ships CUDA headers (cusparse.h among them) that a toolkit without the libraries lacks.
    packages = Path(torch.__file__).parents[1] / "nvidia"
    options["include_dirs"] += [str(p) for p in sorted(packages.glob("*/include"))]
    flags["cxx"] = [*flags["cxx"], "-DTAL_FAST_CUDA"]
    flags["nvcc"] = NVCC_FLAGS
    return CUDAExtension("tal_fast._C", [*sources, "csrc/queue_cuda.cu"], **options)


def extension_and_command() -> tuple[list[Extension], dict[str, type[Command]]]:
    if os.environ.get("TAL_FAST_NO_EXTENSION") == "1":
        say("TAL_FAST_NO_EXTENSION=1: the C++ extension is left out")
        return [], {}
    try:
        without_cuda = cuda_problem()  # before the next import, which reads CUDA_HOME
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        say(f"torch is not importable here ({error}): the C++ extension is left out; use --no-build-isolation")
        return [], {}
    if without_cuda:
        say(f"{without_cuda}: the CUDA sources are left out")

    class OptionalBuild(BuildExtension):
        """Extension build whose failure does not stop the install."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except (Exception, SystemExit) as error:
                if not any(source.endswith(".cu") for e in self.extensions for source in e.sources):
                    self._leave_out(error)
                    return
                say(f"the CUDA sources do not compile and are left out: {first_line(error)}")
                for extension in self.extensions:  # changed in place, to keep the attributes setuptools added
                    vars(extension).update(vars(make_extension(with_cuda=False)))
                try:
                    super().build_extensions()
                except (Exception, SystemExit) as second:
                    self._leave_out(second)

        def _leave_out(self, error: BaseException) -> None:
            say(f"the C++ extension does not compile and is left out: {first_line(error)}")
            self.extensions = self.distribution.ext_modules = []

    return [make_extension(with_cuda=without_cuda is None)], {"build_ext": OptionalBuild}


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


ext_modules, cmdclass = extension_and_command()
setup(
    packages=[*find_packages(include=["tal_fast", "tal_fast.*"]), "tal_fast.kernels"],
    package_dir={"tal_fast": "tal_fast", "tal_fast.kernels": "kernels"},
    package_data={
        "tal_fast": ["py.typed"],
        "tal_fast.config": ["presets/*.yaml"],
        "tal_fast.evaluation.html": ["page.*"],
        "tal_fast.kernels": ["tuned/*.json"],
    },
    include_package_data=False,  # package_data names everything
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
