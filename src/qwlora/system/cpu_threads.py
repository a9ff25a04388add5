"""How OpenMP threads wait and how many there are, decided before torch is imported.

By default OpenMP threads spin while they wait for each other. If other programs use the cores too,
the thread that the others wait for may not be running while they use up its processor time: a
training step of the demo takes many times longer than with one thread
(`benchmarks/train.py shared` measures it). With OMP_WAIT_POLICY=passive they sleep instead, in
GNU's OpenMP (torch's own packages for Linux) as in LLVM's and Intel's.

torch also starts a thread for each physical core of the machine, even where a container or a job
scheduler allows fewer. The number set here is that of the physical cores this process may use:
its affinity mask, bounded by the CPU quota of its cgroup.

OpenMP reads both from the environment when it is loaded. A value that the user set stays.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def configure_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_WAIT_POLICY and OMP_NUM_THREADS for this process and those it starts.

    Has no effect on this process once torch is imported. Several processes on one machine, as
    `torchrun` starts them (LOCAL_WORLD_SIZE), share its cores.
    """
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "passive"
    if not any(name in environment for name in _COUNTS) and (cores := usable_cores()):
        processes = environment.get("LOCAL_WORLD_SIZE", "1")
        share = cores // int(processes) if processes.isdecimal() and int(processes) else cores
        environment["OMP_NUM_THREADS"] = str(max(1, share))


def usable_cores(root: Path = Path("/")) -> int | None:
    """Physical cores that this process may use; None where the system does not say.

    Args:
        root: where `proc` and `sys` are.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cores = {_siblings(root, cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min([len(cores), *(math.ceil(quota) for quota in _quotas(root))]))


def _siblings(root: Path, cpu: int) -> str:
    """The hardware threads on the core of `cpu`, as the kernel lists them (`0,64`)."""
    path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _quotas(root: Path) -> Iterator[float]:
    """CPU quotas of the cgroups around this process, in cores; cgroup versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = f"{line}::".split(":")[:3]
        if line.startswith("0::"):
            mount, files = root / "sys/fs/cgroup", ["cpu.max"]
        elif "cpu" in controllers.split(","):
            mount = root / "sys/fs/cgroup/cpu"
            files = ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            try:
                quota, period = (int(n) for f in files for n in (folder / f).read_text().split())
            except (OSError, ValueError):  # no such file, or "max"
                quota = period = 0
            if quota > 0 and period > 0:
                yield quota / period
            if folder == mount:
                break


def process_count() -> int:
    """Number of processes in this run, set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
