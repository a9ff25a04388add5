"""Where a model computes.

Tensors follow the model: calibration data, prompts and texts may be on the CPU, and every call
moves them to the device of the model that it is given. So `model.to("cuda")` is all that a call
needs to compute on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

T = TypeVar("T")
CPU = torch.device("cpu")


def device_of(module: object) -> torch.device:
    """The device of the first tensor of `module` that has data; the meta device if none has any,
    and the CPU if there are no tensors, as in a function in place of a model."""
    device = None
    tensors = chain(module.parameters(), module.buffers()) if isinstance(module, nn.Module) else ()
    for tensor in tensors:
        device = tensor.device
        if device.type != "meta":
            break
    return CPU if device is None else device


def moved(value: T, device: torch.device) -> T:
    """`value` with the tensors in it, also in dicts, lists and tuples, on `device`."""
    return cast(T, tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, value))


@contextmanager
def on_cpu(*modules: nn.Module) -> Iterator[None]:
    """Within, the modules are on the CPU: for files, and for runtimes that compute there.

    Afterwards they have their tensors again, not copies: those of a simulation are its model's.
    """
    away = {m: device for m in modules if (device := device_of(m)).type not in ("cpu", "meta")}
    parts = {part for module in away for part in module.modules()}
    tensors = [(part, dict(part._parameters), dict(part._buffers)) for part in parts]
    try:
        for module in away:
            module.to(CPU)
        yield
    finally:
        for module, device in away.items():
            module.to(device)
        for part, parameters, buffers in tensors:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
