"""Move a captured graph to another device without moving the model it was captured from.

The graph shares parameters with the model, so they become separate objects before they move.
Devices in the graph (`arange(..., device=cpu)`) are rewritten. Encodings are not buffers and move
separately.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from qwlora.grid.encoding import Encoding


def unshare_moving_(module: nn.Module, move: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter that `move` would move by a new object on the same storage.

    Tied parameters stay tied.
    """
    own: dict[int, nn.Parameter] = {}
    for inner in module.modules():
        for name, parameter in inner._parameters.items():
            if parameter is not None and move(parameter).device != parameter.device:
                if id(parameter) not in own:
                    own[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
                inner._parameters[name] = own[id(parameter)]


def rewrite_devices_(graph_module: GraphModule, device: torch.device) -> None:
    """Set every device constant in the graph to `device`."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, moved)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
    graph_module.recompile()


def device_of(module: nn.Module) -> torch.device:
    """The device of the tensors of `module`; the CPU if it has none."""
    return next(
        (
            tensor.device
            for tensors in (module.parameters(), module.buffers())
            for tensor in tensors
        ),
        torch.device("cpu"),
    )


def moved_encoding(encoding: Encoding, device: torch.device) -> Encoding:
    """`encoding` on `device`; unchanged for the meta device.

    A per-tensor scale must move too: CUDA accepts it on the CPU, but then multiplies by its
    reciprocal instead of dividing.
    """
    if device.type == "meta" or encoding.scale.device == device:
        return encoding
    return replace(encoding, scale=encoding.scale.to(device), low_end=encoding.low_end.to(device))
