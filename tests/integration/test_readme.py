"""README and documentation: Python examples run, links and paths exist."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = [
    pytest.param(block, id=f"{page.stem}-{i}")
    for page in (ROOT / "README.md", *GUIDES)
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE))
]
OPTIONAL = ("lightning", "transformers", "timm")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", EXAMPLES)
def test_examples_run_as_they_stand(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL:
        if re.search(rf"^(from|import) {name}\b", block, re.MULTILINE) and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    if 'load_run("runs/tal"' in block:
        train = "-m tal_fast.train --config digits-tal --epochs 1 --logger none --device cpu --output runs/tal"
        subprocess.run([sys.executable, *train.split()], check=True, capture_output=True)
    exec(compile(block, "example", "exec"), {"__name__": "example"})


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", without_code(page.read_text()))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_of_the_repository_exist(page: Path) -> None:
    names = re.findall(r"`((?:tal_fast|kernels|csrc|bench|tests|docs|examples|\.github)/[\w./-]+)`", page.read_text())
    missing = [name for name in names if not (ROOT / name).exists()]
    assert [name for name in missing if "NAME" not in name and "focal" not in name] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_modules_and_functions_exist(page: Path) -> None:
    names = set(re.findall(r"`(tal_fast(?:\.[A-Za-z_]\w*)+)(?=[`(])", page.read_text()))
    for name in sorted(names - {"tal_fast.COMMAND"}):
        pkgutil.resolve_name(name)


REFERENCE = re.findall(
    r"^::: ([\w.]+)\n(?:    options:\n(?:      (?:members: \[([^\]]*)\]|.*)\n)*)?",
    (ROOT / "docs" / "reference.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize(("path", "members"), REFERENCE, ids=[path for path, _ in REFERENCE])
def test_the_reference_names_what_exists_where_it_is_defined(path: str, members: str) -> None:
    documented = pkgutil.resolve_name(path)
    for member in filter(None, members.split(", ")):
        value = getattr(documented, member)
        if isinstance(documented, types.ModuleType):  # the site reads the module's text, so imported names are missing
            assert value.__module__ == path, member
    if not isinstance(documented, types.ModuleType):
        assert documented.__module__ == path.rpartition(".")[0]


def test_the_reference_has_blocks_with_members() -> None:
    text = (ROOT / "docs" / "reference.md").read_text()
    assert len(REFERENCE) == text.count("\n::: ") > 0
    assert sum(bool(members) for _, members in REFERENCE) == text.count("members: [") > 0
