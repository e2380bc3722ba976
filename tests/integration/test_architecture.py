"""Layout of the package: layers, size of the entry points."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The package as it is installed, with kernels/ as tal_fast.kernels."""
    ignore = shutil.ignore_patterns("__pycache__", "_C*", "kernels")
    shutil.copytree(ROOT / "tal_fast", tmp_path / "tal_fast", ignore=ignore)
    shutil.copytree(ROOT / "kernels", tmp_path / "tal_fast" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = (
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(sys.argv[1], no_cache=True))"
    )
    return subprocess.run(
        [sys.executable, "-c", command, str(ROOT / ".importlinter")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_packages_import_only_from_the_packages_below_them(installed: Path) -> None:
    done = lint(installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("loss/reference.py", "from tal_fast.training import optim"),
        ("kernels/launch.py", "from tal_fast.utils import signals"),
        ("evaluation/report.py", "import tal_fast.training.optim"),
    ],
)
def test_an_import_from_a_higher_package_breaks_the_contract(installed: Path, module: str, statement: str) -> None:
    path = installed / "tal_fast" / module
    path.write_text(path.read_text() + f"\n{statement}\n")
    done = lint(installed)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "0 kept, 1 broken" in done.stdout


def test_top_level_modules_are_few_and_short() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tal_fast").glob("*.py")}
    assert len(lines) <= 16
    assert {name: count for name, count in lines.items() if count > 30} == {}
