"""SLURM batch file, run with stand-ins for srun, scontrol and squeue that behave as SLURM's manual says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")

SRUN = """#!/bin/bash
# Runs the tasks one after the other; each of them ends as its turn in ENDS says, and srun with the highest code.
while [[ "$1" == --* ]]; do echo "$1" >>"$LOG/srun"; shift; done
turn=$(cat "$LOG/turn" 2>/dev/null || echo 0)
echo $((turn + 1)) >"$LOG/turn"
ends=($ENDS)
highest=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) END=${ends[turn]} "$@"
    code=$?
    ((code > highest)) && highest=$code
done
exit $highest
"""
PYTHON = """#!/bin/bash
echo "$RANK/$WORLD_SIZE/$LOCAL_RANK $MASTER_ADDR:$MASTER_PORT $*" >>"$LOG/tasks"
[[ "$END" == term ]] && { kill -TERM "$BATCH_PID"; sleep 0.3; exit 75; }
exit "$END"
"""
SCONTROL = """#!/bin/bash
echo "$*" >>"$LOG/scontrol"
[[ "$1 $2" == "show hostnames" ]] && { echo node7; echo node8; exit 0; }
exit "${REQUEUE_CODE:-0}"
"""
SQUEUE = """#!/bin/bash
echo "${STATE:-RUNNING}"
"""


@dataclass
class Result:
    code: int
    said: str
    tasks: list[str]
    requeued: bool


def submit(folder: Path, ends: str, *options: str, **environment: str) -> Result:
    """Run the batch file as SLURM does, on two nodes with two tasks each."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in {"srun": SRUN, "python": PYTHON, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", 'export BATCH_PID=$$; exec bash "$@"', "slurmd", str(SCRIPT), *options],
        env={
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "LOG": str(folder),
            "ENDS": ends,
            "SLURM_JOB_ID": "41",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_NTASKS": "4",
            "TAL_FAST_RESTART_DELAY": "0",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
    )
    log = (folder / "scontrol").read_text().splitlines()
    return Result(done.returncode, done.stderr, (folder / "tasks").read_text().splitlines(), "requeue 41" in log)


def test_each_task_becomes_a_rank(tmp_path: Path) -> None:
    result = submit(tmp_path, "0", "--config", "folder-tal", "--data.root", "/a b")
    assert result == Result(
        0,
        "",
        [
            f"{rank}/4/{rank % 2} node7:20041 -m tal_fast.train --config folder-tal --data.root /a b --resume auto"
            for rank in range(4)
        ],
        requeued=False,
    )
    assert (tmp_path / "srun").read_text().split() == ["--kill-on-bad-exit=0", "--wait=60"]


def test_exit_code_75_requeues_the_job(tmp_path: Path) -> None:
    result = submit(tmp_path, "75")
    assert (result.code, result.requeued, len(result.tasks)) == (0, True, 4)
    assert result.said == "saved; requeueing job 41\n"


def test_exit_code_survives_a_signal_to_the_shell(tmp_path: Path) -> None:
    result = submit(tmp_path, "term")
    assert (result.code, result.requeued) == (0, True)


def test_failed_requeue_is_reported(tmp_path: Path) -> None:
    result = submit(tmp_path, "75", REQUEUE_CODE="1")
    assert result.code == 75
    assert "scontrol could not requeue job 41; submit it again" in result.said


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING"])
def test_job_that_is_not_running_is_not_requeued(tmp_path: Path, state: str) -> None:
    result = submit(tmp_path, "75", STATE=state)
    assert (result.code, result.requeued) == (75, False)
    assert f"not requeued: the job is {state}" in result.said


@pytest.mark.parametrize("code", [2, 130])
def test_user_errors_and_interrupts_end_the_job(tmp_path: Path, code: int) -> None:
    result = submit(tmp_path, f"{code} 0")
    assert (result.code, result.requeued, len(result.tasks)) == (code, False, 4)


def test_crash_restarts_from_the_last_checkpoint(tmp_path: Path) -> None:
    result = submit(tmp_path, "137 1 75")
    assert (result.code, result.requeued, len(result.tasks)) == (0, True, 12)
    assert result.said.count("starting it again from its last checkpoint") == 2


def test_restarts_are_limited(tmp_path: Path) -> None:
    result = submit(tmp_path, "1 1 1 1 1", TAL_FAST_RESTARTS="2")
    assert (result.code, result.requeued, len(result.tasks)) == (1, False, 12)
    assert "training ended with exit code 1 after 2 restarts; giving up" in result.said


def test_batch_directives_request_a_signal_and_requeueing() -> None:
    text = SCRIPT.read_text()
    assert re.search(r"^#SBATCH --signal=USR1@(\d+)$", text, re.MULTILINE)
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)
    directives = [number for number, line in enumerate(text.splitlines()) if line.startswith("#SBATCH")]
    first_command = text.splitlines().index("set -u")
    assert max(directives) < first_command  # SLURM reads none after it


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_passes() -> None:
    done = subprocess.run(["shellcheck", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
