"""Where a model computes.

Tensors follow the model: calibration data, prompts and texts may be on the CPU, and every call
moves them to the device of the model that it is given. So `model.to("cuda")` is all that a call
needs to compute on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qwlora.errors import LESS_MEMORY, DeviceError, described
from qwlora.system.machine import device_type, exact_type

T = TypeVar("T")
CPU = torch.device("cpu")


def device_of(module: object) -> torch.device:
    """The device of the first tensor of `module` that has data; the meta device if none has any,
    and the CPU if there are no tensors, for example where a function replaces the model."""
    device = None
    tensors = chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()
    for tensor in tensors:
        device = tensor.device
        if device.type != "meta":
            break
    return CPU if device is None else device


def pick_device(key: str) -> torch.device:
    """The device of `device` in a recipe. Of several GPUs, each process of a run has its own.

    Raises:
        DeviceError: this machine does not have it, or torch cannot use it.
    """
    kind = device_type(key)
    if kind == "cpu":
        return CPU
    module: Any = getattr(torch, kind, None)
    count = module.device_count() if module is not None and module.is_available() else 0
    if key == "auto" and not count:
        return CPU  # a GPU that the driver knows, but that this build of torch cannot use
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
    """Measure the memory of another device than the CPU: afterwards, the dict has its type as
    `device`, and, where torch counts it, `peak_device_bytes`.

    Args:
        what: needs the memory.

    Raises:
        DeviceError: the device is out of memory.
    """
    module: Any = getattr(torch, device.type)
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
    """Within, the modules are on the CPU: for files, and for runtimes that compute there.

    A simulation has its own tensors again afterwards, not copies: they are its model's.
    """
    away = {m: device for m in modules if (device := device_of(m)).type not in ("cpu", "meta")}
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
        for module, device in away.items():  # what is not a parameter or buffer
            module.to(device)
