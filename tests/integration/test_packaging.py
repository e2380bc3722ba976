"""The sdist and the wheel hold what they should, and the wheel works in an environment that has nothing of ours."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env}, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """sdist, and the wheel built from it: what a user gets."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    tracked = run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / ".git").exists() else None
    if tracked is None:
        pytest.skip("not a git checkout")
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), cwd=source)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_sdist_and_wheel_contents(artifacts: tuple[Path, Path]) -> None:
    sdist, wheel = artifacts
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/ops.cpp", "csrc/kernels_cpu.inc", "csrc/simd.h", "kernels/__init__.py"} <= names
    assert {"tal_fast/py.typed", "setup.py", "LICENSE", "README.md"} <= names
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"tal_fast/py.typed", "tal_fast/kernels/__init__.py", "tal_fast/loss/module.py"} <= names
    assert {f"tal_fast/evaluation/html/page.{kind}" for kind in ("html.j2", "css", "js")} <= names
    assert "tal_fast/evaluation/card.md.j2" in names
    assert any(name.startswith("tal_fast/config/presets/") and name.endswith(".yaml") for name in names)
    assert not any(name.startswith("kernels/") for name in names)  # never a top-level import name
    if shutil.which("g++"):
        assert "tal_fast/_C.abi3.so" in names


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_wheel_works_in_a_clean_environment(artifacts: tuple[Path, Path], tmp_path: Path) -> None:
    """A new virtual environment that sees this one's torch and nothing else that is installed editable here."""
    home = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", str(home), cwd=tmp_path)
    python = home / "bin" / "python"
    site = Path(run(str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(
        sys.executable, "-m", "pip", "--python", str(python), "install",
        "--no-deps", "--no-index", "--ignore-installed", str(artifacts[1]), cwd=tmp_path,
    )  # fmt: skip
    code = """
import tal_fast, torch
from tal_fast import TALLoss, kernels
from tal_fast.loss import _extension
print(tal_fast.__file__, kernels.__file__, sep="\\n")
loss_fn = TALLoss(queue_size=10)
z = torch.randn(8, 5, requires_grad=True)
loss_fn(z, torch.rand(8, 6), torch.randint(5, (8,))).backward()
print(_extension.load()[1])
"""
    where, kernels, extension = run(str(python), "-c", code, cwd=tmp_path).splitlines()
    assert where.startswith(str(site))
    assert kernels.startswith(str(site))
    assert "kernels" in extension or not shutil.which("g++")
    assert "tal_fast" in run(str(python), "-m", "tal_fast.info", cwd=tmp_path)
    assert "tal_fast" in run(str(home / "bin" / "tal-fast"), "info", cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_old_setuptools_is_refused_in_one_sentence(tmp_path: Path) -> None:
    names = "Command = Extension = None\nfind_packages = setup = lambda **_: []"
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text(f"__version__ = '65.5.0'\n{names}\n")

    def set_up(folder: Path) -> subprocess.CompletedProcess[str]:
        environ = {**os.environ, "PYTHONPATH": str(tmp_path), "TAL_FAST_NO_EXTENSION": "1"}
        command = [sys.executable, str(ROOT / "setup.py"), "--version"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environ)

    done = set_up(ROOT)
    assert done.returncode == 1
    assert done.stderr == (
        "tal-fast: setuptools 65.5.0 is too old to read pyproject.toml; run: pip install --upgrade 'setuptools>=77'\n"
    )
    assert set_up(tmp_path).returncode == 0  # without the file it serves: bench/gpu.sh builds the extension so


@pytest.mark.parametrize("damage", ["missing", "unloadable"])
def test_an_extension_that_does_not_load_costs_one_warning(damage: str, tmp_path: Path) -> None:
    package = tmp_path / "tal_fast"
    shutil.copytree(ROOT / "tal_fast", package, ignore=shutil.ignore_patterns("_C*", "kernels", "__pycache__"))
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    if damage == "unloadable":
        (package / "_C.abi3.so").write_bytes(b"not a library")
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from tal_fast import TALLoss, FeatureQueue
    import tal_fast
    for _ in range(2):
        TALLoss(queue_size=4)(torch.randn(3, 2), torch.rand(3, 4), torch.zeros(3, dtype=torch.int64))
        FeatureQueue(3).push(torch.rand(2), torch.rand(2))
ours = [str(w.message) for w in caught if "tal_fast" in str(w.message)]
print(tal_fast.__file__, len(ours), ours[0], sep="\\n")
"""
    where, count, message = run(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path), TAL_FAST_NO_EXTENSION="0"
    ).splitlines()
    assert where.startswith(str(tmp_path))
    assert count == "1"
    assert ("not built" if damage == "missing" else "does not load") in message
    assert "pip install --no-build-isolation" in message
