"""How threads wait and how many there are, before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwlora.system.machine import configure_threads, usable_cores


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root folder of a machine with eight hardware threads, two to a core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for cpu in range(8):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_hardware_threads_of_one_core_count_once(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert usable_cores(machine) == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 5})
    assert usable_cores(machine) == 2


@pytest.mark.parametrize(
    ("where", "quota", "cores"),
    [
        ("job/step", "150000 100000", 2),
        ("job", "50000 100000", 1),  # of the group around it
        ("", "300000 100000", 3),
        ("job/step", "max 100000", 4),
        ("job/step", "unreadable", 4),
        ("job/step", "6400000 100000", 4),
    ],
)
def test_a_quota_of_cgroup_2_bounds_the_cores(
    machine: Path, where: str, quota: str, cores: int
) -> None:
    write(machine / "proc/self/cgroup", "0::/job/step\n")
    write(machine / "sys/fs/cgroup" / where / "cpu.max", f"{quota}\n")
    assert usable_cores(machine) == cores


@pytest.mark.parametrize(("quota", "cores"), [(250000, 3), (-1, 4)])
def test_a_quota_of_cgroup_1_bounds_the_cores(machine: Path, quota: int, cores: int) -> None:
    write(machine / "proc/self/cgroup", "4:memory:/a\n3:cpuset:/b\n1:cpu,cpuacct:/job\n0::/\n")
    folder = machine / "sys/fs/cgroup/cpu/job"
    write(folder / "cpu.cfs_quota_us", f"{quota}\n")
    write(folder / "cpu.cfs_period_us", "100000\n")
    assert usable_cores(machine) == cores


def test_a_group_outside_the_container_is_looked_up_at_the_root(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "0::/host/pod\n")
    write(machine / "sys/fs/cgroup/cpu.max", "100000 100000\n")
    assert usable_cores(machine) == 1


WAITING = {"OMP_WAIT_POLICY": "passive"}
COUNT = {"OMP_NUM_THREADS": str(usable_cores())}


@pytest.mark.parametrize(
    ("chosen", "added"),
    [
        ("", WAITING | COUNT),
        *((name, COUNT) for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")),
        *((name, WAITING) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")),
    ],
)
def test_what_the_user_did_not_set_is_set(chosen: str, added: dict[str, str]) -> None:
    environment = {chosen: "7"}
    configure_threads(environment)
    assert environment == added | {chosen: "7"}


@pytest.mark.parametrize(("processes", "threads"), [("2", "2"), ("3", "1"), ("9", "1")])
def test_processes_on_one_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, processes: str, threads: str
) -> None:
    monkeypatch.setattr("qwlora.system.machine.usable_cores", lambda: 4)
    environment = {"LOCAL_WORLD_SIZE": processes}
    configure_threads(environment)
    assert environment["OMP_NUM_THREADS"] == threads


def test_the_command_line_decides_before_torch_is_imported() -> None:
    script = (
        "import builtins, os, sys\n"
        "original = builtins.__import__\n"
        "def watched(name, *rest):\n"
        "    if name == 'torch' and 'torch' not in sys.modules:\n"
        "        print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('OMP_NUM_THREADS'))\n"
        "        os._exit(0)\n"
        "    return original(name, *rest)\n"
        "builtins.__import__ = watched\n"
        "from qwlora.cli.main import main\n"
        "sys.argv = ['qwlora', 'inspect', sys.argv[1]]\n"
        "main()\n"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))}
    command = [sys.executable, "-c", script, "."]
    done = subprocess.run(command, env=clean, stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.split() == ["passive", str(usable_cores())]
