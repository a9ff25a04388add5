"""The processor, the precision that `compute: auto` selects on it or on an accelerator, and a
warning where bfloat16 is emulated.

bfloat16 if the device has instructions for it, else float32. A processor without bfloat16
instructions converts each operand instead, which made a layer seven times slower than float32.

The decision does not import torch, because stage keys depend on it and a run that skips every stage
never imports torch. So it reads /proc/cpuinfo, and asks the driver about an NVIDIA GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import sys
from functools import cache
from pathlib import Path
from typing import Literal

from qwlora.errors import QwloraWarning

Compute = Literal["float32", "bfloat16"]

_CPU_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}  # of x86, x86 and ARM
_AMPERE = 8  # major compute capability of the first NVIDIA GPUs that multiply in bfloat16
_MAJOR = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR


class SlowComputeWarning(QwloraWarning):
    """bfloat16 was asked for on a device that emulates it."""


def auto_compute(device: str) -> Compute:
    """What `compute: auto` selects on a device of this torch type (cpu, cuda, ...)."""
    return "bfloat16" if has_bfloat16(device) else "float32"


@cache
def has_bfloat16(device: str) -> bool:
    """Whether a device of this type has bfloat16 instructions. MPS counts as having none."""
    if device == "cpu":
        return _cpu_has_bfloat16()
    if device == "cuda" and _has_library("torch_cuda"):
        return _nvidia_major() >= _AMPERE
    if device in ("cuda", "xpu"):
        import torch

        return bool(getattr(torch, device).is_bf16_supported(including_emulation=False))
    return False


@cache
def training_device() -> str:
    """The type of the device that adapters are trained on: an accelerator if torch can use one."""
    if sys.platform == "linux" and not _has_library("torch_hip") and not _has_library("torch_xpu"):
        return "cuda" if _has_library("torch_cuda") and _nvidia_major() else "cpu"
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
    return _processor_facts().get("model name") or platform.processor()


def _processor_facts() -> dict[str, str]:
    """Names and values of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return {}
    pairs = [line.partition(":") for line in reversed(lines)]
    return {name.strip(): value.strip() for name, _, value in pairs}


def _cpu_has_bfloat16() -> bool:
    facts = _processor_facts()
    if not facts:  # not Linux
        import torch

        found = torch.cpu.get_capabilities()
        return any(found.get(feature, False) for feature in _CPU_FEATURES)
    features = facts.get("flags") or facts.get("Features", "")
    return not _CPU_FEATURES.isdisjoint(features.split())


def _has_library(name: str) -> bool:
    """Whether the installed torch was built with this part."""
    spec = importlib.util.find_spec("torch")
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    return any(Path(folder, "lib", f"lib{name}.so").exists() for folder in folders)


@cache
def _nvidia_major() -> int:
    """Major compute capability of the first visible NVIDIA GPU; 0 if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count, device, major = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return 0
    driver.cuDeviceGet(ctypes.byref(device), 0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    return major.value
