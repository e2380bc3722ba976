"""Command-line parsing shared by the commands."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tal_fast.__main__ import COMMANDS

PROBE = """
import contextlib, importlib, io, json, os, sys
os.environ["COLUMNS"] = "200"
found = {}
for name in sys.argv[1:]:
    main = importlib.import_module("tal_fast." + name.replace("-", "_")).main
    for option in ("--help", "--no-such-option=1"):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([option])
            except SystemExit as stop:
                code = stop.code
        found[name + " " + option] = [code, out.getvalue(), err.getvalue(), "torch" in sys.modules]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str, str, bool]]:
    """Exit code, outputs, and whether PyTorch was imported, of each command with --help and with an unknown option."""
    done = subprocess.run([sys.executable, "-c", PROBE, *COMMANDS], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_at_most_100_columns_wide_and_needs_no_torch(
    command: str, answers: dict[str, tuple[int, str, str, bool]]
) -> None:
    code, out, err, torch_imported = answers[f"{command} --help"]
    assert (code, err, torch_imported) == (0, "", False)
    assert out.startswith("usage: ")
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_a_mistake_is_named_in_one_line(command: str, answers: dict[str, tuple[int, str, str, bool]]) -> None:
    code, out, err, _ = answers[f"{command} --no-such-option=1"]
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
