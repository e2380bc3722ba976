"""Mutations of ``bench.mutate``: they apply to the sources, their tests exist, and the committed results are theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from bench.mutate import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_mutated_text_occurs_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert (ROOT / mutation.tests[0]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("tests", dict.fromkeys(m.tests for m in MUTATIONS), ids=" ".join)
def test_selection_collects_tests(tests: tuple[str, ...]) -> None:
    """A renamed test would leave a mutation without any; pytest exits 5 then."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stdout + done.stderr


def test_committed_results_are_of_these_mutations() -> None:
    results = json.loads((ROOT / "bench" / "results" / "mutations.json").read_text())["results"]
    assert [(r["mutation"], r["old"], r["new"]) for r in results] == [(m.name, m.old, m.new) for m in MUTATIONS]
    assert all(r["caught"] for r in results)
    assert f"{len(results)} faults" in (ROOT / "docs" / "performance.md").read_text()
