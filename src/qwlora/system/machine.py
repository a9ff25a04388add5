"""The machine: precision of its processor and accelerators, threads and memory.

`system/device.py` turns the recipe's `device` into a device of torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, MutableMapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from qwlora.errors import QwloraWarning

Compute = Literal["float32", "bfloat16"]

# The first two are of x86, the last one is of ARM.
_CPU_FEATURES = ("avx512_bf16", "amx_bf16", "bf16")
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PACKAGES = ("qwlora", "torch", "transformers", "peft", "onnx", "onnxruntime")


class SlowComputeWarning(QwloraWarning):
    """bfloat16 was asked for on a device that emulates it."""


def auto_compute(device: str) -> Compute:
    """What `compute: auto` selects on a device of this torch type (cpu, cuda, ...)."""
    # A processor without bfloat16 instructions converts each operand, which made a layer seven
    # times slower than float32.
    return "bfloat16" if has_bfloat16(device) else "float32"


@cache
def has_bfloat16(device: str) -> bool:
    """Whether a device of this type has bfloat16 instructions. MPS counts as having none."""
    import torch

    if device == "cpu":
        has = torch.cpu.get_capabilities()
        return any(has.get(feature, False) for feature in _CPU_FEATURES)
    # By default, torch counts GPUs that emulate bfloat16 as well.
    if device in ("cuda", "xpu"):
        module = getattr(torch, device)
        return bool(module.is_available() and module.is_bf16_supported(including_emulation=False))
    return False


def device_type(key: str) -> str:
    """The torch type (cpu, cuda, ...) of `device` in a recipe: auto, or one with or without a
    number."""
    return accelerator() if key == "auto" else key.partition(":")[0]


def exact_type(device: str) -> str:
    """The type of the device that solvers and observers use next to one of type `device`."""
    # They compute in float64, which MPS and most XPUs lack.
    return "cpu" if device in ("mps", "xpu") else device


@cache
def accelerator() -> str:
    """The type of the accelerator that torch can use here; cpu if there is none."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if device is None else device.type


def slow_compute(compute: str, device: str) -> str | None:
    """A warning if the device emulates the requested `compute`, else None."""
    if compute != "bfloat16" or has_bfloat16(device):
        return None
    kind = "processor" if device == "cpu" else f"{device} device"
    return (
        f"compute bfloat16: this {kind} has no bfloat16 instructions and emulates them, which "
        "takes several times as long as float32. Set compute to auto or float32"
    )


def processor_name() -> str:
    """The processor's model, for example "AMD EPYC 9B14"; empty if it is unknown."""
    with contextlib.suppress(OSError):  # not Linux
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+)", facts, re.MULTILINE):
            return match[1].strip()
    return platform.processor()


def configure_threads(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set OMP_WAIT_POLICY and OMP_NUM_THREADS for this process and those it starts.

    A value that the user set stays. Several processes on one machine, as `torchrun` starts them
    (LOCAL_WORLD_SIZE), share its cores.
    """
    # OpenMP reads both when it is loaded, so they have no effect once torch is imported.
    # By default, its threads spin while they wait for each other. If another program uses the
    # cores, they use up the processor time of the thread that they wait for: on two shared cores, a
    # training step took twice as long as with one thread (benchmarks/shared_cpu.py). Passive
    # threads sleep, in GNU's OpenMP (torch's packages for Linux) as in LLVM's and Intel's.
    if not any(name in environment for name in _WAITING):
        environment["OMP_WAIT_POLICY"] = "passive"
    # torch starts a thread for each physical core of the machine, even where a container or a job
    # scheduler allows fewer.
    if not any(name in environment for name in _COUNTS) and (cores := usable_cores()):
        processes = environment.get("LOCAL_WORLD_SIZE", "1")
        share = cores // int(processes) if processes.isdecimal() and int(processes) else cores
        environment["OMP_NUM_THREADS"] = str(max(1, share))


def usable_cores(root: Path = Path("/")) -> int | None:
    """Physical cores that this process may use; None where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    # The kernel counts hardware threads. Those of one core have the same list (`0,64`).
    cores = set[str]()
    for cpu in os.sched_getaffinity(0):
        siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, min([len(cores), *(math.ceil(quota) for quota in _quotas(root))]))


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
        # The tightest quota counts, and it may be that of an outer cgroup.
        inner = mount / path.lstrip("/")
        for folder in (inner, *inner.parents):
            # A file is missing, or says "max".
            with contextlib.suppress(OSError, ValueError):
                quota, period = (int(n) for f in files for n in (folder / f).read_text().split())
                if quota > 0 and period > 0:
                    yield quota / period


def process_count() -> int:
    """Number of processes in this run, set by the launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def return_freed_memory() -> bool:
    """Make glibc return its free pages to the system now; False if malloc is not glibc's."""
    # This takes 20 ms per 100 MB, and as long again when the pages are next used. Having malloc
    # return every large block by itself (M_MMAP_THRESHOLD of 8 MiB) was slower: a checkpointed step
    # of SmolLM2 spent 5 of 28 seconds in page faults.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0) or True)


def reset_peak_rss() -> None:
    """Reset the peak (Linux only)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_bytes() -> int:
    """Largest resident size in bytes since `reset_peak_rss`."""
    with contextlib.suppress(OSError):
        if match := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(match[1]) * 1024
    # Other systems cannot reset the peak: this is the largest size since the process began.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_limit_bytes() -> int | None:
    """Memory that this process may use: the machine's, or less in a container; None if unknown."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(file).read_text()))
    return min(limits) if limits else None


@cache
def versions() -> dict[str, str]:
    """Releases of the packages that results depend on."""
    releases = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            releases[package] = version(package)
    return releases


@cache
def machine() -> dict[str, Any]:
    """The machine, without its name."""
    # Reports are passed on, so that the host's name is not in them.
    facts: dict[str, Any] = {"system": platform.system(), "architecture": platform.machine()}
    facts["cores"] = os.cpu_count()
    if name := processor_name():
        facts["processor"] = name
    with contextlib.suppress(OSError, ValueError):  # not Linux
        facts["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return facts
