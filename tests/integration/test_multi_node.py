"""Multi-node recipe of docs/guides/clusters.md, with two network namespaces as hosts."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.faults.runs import Job, differences, last, options, torchrun, undisturbed, wait_for

EPOCHS = 5


@dataclass
class Host:
    """Network namespace with one network card that stands for a host."""

    namespace: str
    address: str
    card: str = "eth0"

    def command(self, *words: str) -> list[str]:
        """Command that runs ``words`` on this host."""
        return ["ip", "netns", "exec", self.namespace, "env", f"GLOO_SOCKET_IFNAME={self.card}", *words]

    def plug(self, state: str) -> None:
        """Set the network card ``up`` or ``down``."""
        ip("-n", self.namespace, "link", "set", self.card, state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    """Two connected hosts."""
    names = [f"tal-{os.getpid()}-{letter}" for letter in "ab"]
    pair = Host(names[0], "192.0.2.1"), Host(names[1], "192.0.2.2")  # addresses that RFC 5737 keeps for examples
    if not shutil.which("ip"):
        pytest.skip("needs the program ip (Debian: iproute2)")
    try:
        for name in names:
            ip("netns", "add", name)
        far = ["peer", "name", pair[1].card, "netns", names[1]]
        ip("link", "add", pair[0].card, "netns", names[0], "type", "veth", *far)
        for host in pair:
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", host.card)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.plug("up")
        yield pair
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not make network namespaces here: {error.stderr.strip()}")
    finally:
        for name in names:  # the cards go with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def start(
    stack: ExitStack, hosts: tuple[Host, Host], folder: Path, module: list[str], train: list[str], nodes: str = "2"
) -> list[Job]:
    """Start the recipe's command on each host; only the address and the first host's flag differ."""
    jobs = []
    for number, host in enumerate(hosts):
        rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={hosts[0].address}:29500 --rdzv-id=run1"
        own = f"--rdzv-conf=is_host={int(number == 0)} --local-addr={host.address}"
        launcher = f"--nnodes={nodes} --nproc-per-node=1 --max-restarts=1 {rendezvous} {own}"
        words = host.command("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", *torchrun(*launcher.split()), "-m", *module)
        jobs.append(stack.enter_context(Job(folder / f"host{number}", [*words, *train])))
    return jobs


def ended_well(job: Job) -> None:
    done = job.end(timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def one_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of the same two ranks on one host."""
    return undisturbed(tmp_path_factory.mktemp("one-host") / "folder", 2, EPOCHS)


@pytest.mark.slow
def test_two_hosts_equal_two_processes_on_one_host(hosts: tuple[Host, Host], one_host: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with ExitStack() as stack:
        jobs = start(stack, hosts, tmp_path, ["tal_fast.train"], options(output, EPOCHS))
        wait_for("a checkpoint", last(output).exists)
        hosts[1].plug("down")
        time.sleep(2)
        step = last(output).stat().st_mtime
        time.sleep(1)
        assert last(output).stat().st_mtime == step  # the hosts do need each other
        hosts[1].plug("up")
        for job in jobs:
            ended_well(job)
    assert "2 x cpu" in jobs[0].out + jobs[1].out
    assert differences(one_host, output) == []


@pytest.mark.slow
def test_rank_killed_on_another_host_is_restarted(hosts: tuple[Host, Host], one_host: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    with ExitStack() as stack:
        train = options(output, EPOCHS, "--resume", "auto")
        jobs = start(stack, hosts, tmp_path, ["bench.fault_points", "rank1:step:33:0.0"], train)
        for job in jobs:
            ended_well(job)
    said = jobs[0].out + jobs[1].out
    assert "resuming from" in said
    assert differences(one_host, output) == []


@pytest.mark.slow
def test_remaining_host_continues_without_a_lost_host(hosts: tuple[Host, Host], tmp_path: Path) -> None:
    output = tmp_path / "run"
    with ExitStack() as stack:
        train = options(output, EPOCHS, "--resume", "auto")
        jobs = start(stack, hosts, tmp_path, ["bench.fault_points", "host1:step:33:0.0"], train, nodes="1:2")
        wait_for("the loss of a host", lambda: any(job.process.poll() is not None for job in jobs))
        (left,) = (job for job in jobs if job.process.poll() is None)
        lost = time.monotonic()
        wait_for("the other to go on", lambda: "warning: ranks 2 -> 1 since" in left.err)
        print(f"went on after {time.monotonic() - lost:.0f} s")
        ended_well(left)
    assert f"epoch {EPOCHS}/{EPOCHS}" in left.out
