"""Where a model computes.

Tensors follow the model: every call moves its data to the device of the model that it is given, so
`model.to("cuda")` is all that a call needs to compute on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qwlora.errors import LESS_MEMORY, DeviceError, described
from qwlora.system.machine import device_type, exact_type

T = TypeVar("T")
CPU = torch.device("cpu")
# Relative to the largest sum of 512 products. Measured errors: float32 1e-6, TF32 7e-4,
# bfloat16 2e-3.
_FLOAT32_TOLERANCE = 1e-5


def device_of(module: object) -> torch.device:
    """The device of the first tensor of `module` that has data; the meta device if none has any,
    and the CPU if there are no tensors, for example where a function replaces the model."""
    tensors = chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()
    device = CPU
    for tensor in tensors:
        device = tensor.device
        if device.type != "meta":
            break
    return device


def pick_device(key: str) -> torch.device:
    """The device of `device` in a recipe. Each process of a run has its own GPU.

    Raises:
        DeviceError: this machine does not have it, or torch cannot use it.
    """
    kind = device_type(key)
    if kind == "cpu":
        return CPU
    module: Any = getattr(torch, kind, None)
    count = module.device_count() if module is not None and module.is_available() else 0
    # The driver may know a GPU that this build of torch cannot use.
    if key == "auto" and not count:
        return CPU
    # The launcher numbers the processes of each machine. With a single GPU, they share it.
    number = key.partition(":")[2] or (os.environ.get("LOCAL_RANK", "0") if count > 1 else "0")
    if int(number) >= count:
        there = f"{count} of type {kind}, numbered from 0" if count else f"none of type {kind}"
        raise DeviceError(
            f"device: {key} needs {kind}:{number}, but torch finds {there} on this machine. Set "
            "device: auto (or --device auto) to use what there is, or install a build of torch for "
            "it (docs/gpu.md)"
        )
    return torch.device(kind, int(number))


def exact_device(device: torch.device) -> torch.device:
    """Where solvers and observers compute next to `device`; see `exact_type`."""
    return device if exact_type(device.type) == device.type else CPU


@contextmanager
def memory_of(device: torch.device, what: str) -> Iterator[dict[str, Any]]:
    """Measure the memory of a device. Unless it is the CPU, the dict then has its type as `device`,
    and `peak_device_bytes` if torch counts them.

    Raises:
        DeviceError: the device is out of memory. `what` names the step in the message.
    """
    module: Any = getattr(torch, device.type)
    # Neither torch.cpu nor torch.mps has it.
    counts = hasattr(module, "max_memory_allocated")
    measured = dict[str, Any]()
    if counts:
        module.reset_peak_memory_stats(device)
    try:
        yield measured
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{what}: {device} is out of memory ({described(error)}). {LESS_MEMORY}, or set "
            "device: cpu"
        ) from error
    if device != CPU:
        measured["device"] = device.type
    if counts:
        measured["peak_device_bytes"] = module.max_memory_allocated(device)


def moved(value: T, device: torch.device) -> T:
    """`value` with the tensors in it, also in dicts, lists and tuples, on `device`."""
    return cast(T, tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value))


@contextmanager
def on_cpu(*modules: nn.Module) -> Iterator[None]:
    """Within, the modules are on the CPU: for files, and for runtimes that compute there."""
    away = {m: device for m in modules if (device := device_of(m)).type not in ("cpu", "meta")}
    # A simulation shares its tensors with its model, so it gets the same ones back, not copies.
    parts = {part for module in away for part in module.modules()}
    tensors = [(part, dict(part._parameters), dict(part._buffers)) for part in parts]
    try:
        for module in away:
            module.to(CPU)
        yield
    finally:
        for part, parameters, buffers in tensors:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        # Modules may move more than parameters and buffers in `to`.
        for module, device in away.items():
            module.to(device)


@contextmanager
def onednn_float32_matmul(device: torch.device | str = "cpu") -> Iterator[None]:
    """Compute float32 products on a CPU by oneDNN, if exact, until the context ends. A precision
    that the user has set, and accelerators, are left alone."""
    if torch.device(device).type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        yield
        return
    # MKL, torch's default, does not use AVX-512 on CPUs that are not Intel's: 110 GFLOPS a thread
    # on AMD, where oneDNN does 235 (docs/log/training.md).
    torch.set_float32_matmul_precision("medium" if onednn_is_exact() else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@cache
def onednn_is_exact() -> bool:
    """Whether precision "medium" computes float32 products on this CPU. It selects oneDNN, but also
    allows bfloat16 inside a product on CPUs with units for it (AMX)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 512, generator=generator)
    w = torch.randn(1024, 512, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        y = x @ w.T
        for product, left, right in ((y, x, w.T), (y @ w, y, w)):
            exact = left.double() @ right.double()
            if float((product - exact).abs().max() / exact.abs().max()) >= _FLOAT32_TOLERANCE:
                return False
        return True
    finally:
        torch.set_float32_matmul_precision(before)
