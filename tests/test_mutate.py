"""The mutations that ``python -m bench.mutate`` tries still apply to the sources."""

from __future__ import annotations

import json

import pytest

from bench.mutate import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_text_stands_once(mutation: Mutation) -> None:
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert (ROOT / mutation.tests[0]).is_file()


def test_committed_results_are_of_these_mutations() -> None:
    results = json.loads((ROOT / "bench" / "results" / "mutations.json").read_text())["results"]
    assert [(r["mutation"], r["old"], r["new"]) for r in results] == [(m.name, m.old, m.new) for m in MUTATIONS]
    assert all(r["caught"] for r in results)
    assert f"{len(results)} faults" in (ROOT / "docs" / "performance.md").read_text()
