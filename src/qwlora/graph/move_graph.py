"""Moving a captured graph to another device, without moving the model that it was captured from.

The graph shares parameters with the model, so before one moves it gets an object of its own on the same storage. Devices also stand in the graph as constants
(`arange(..., device=cpu)`): those are rewritten. Encodings are no buffers, and go along.
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
    """Give each parameter that `move` would move an object of its own; tied ones stay tied."""
    own: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and move(parameter).device != parameter.device:
                if id(parameter) not in own:
                    own[id(parameter)] = nn.Parameter(parameter.detach(), parameter.requires_grad)
                part._parameters[name] = own[id(parameter)]


def rewrite_devices_(graph_module: GraphModule, device: torch.device) -> None:
    """Let every constant device in the graph be `device`."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph_module.graph.nodes:
        node.args = torch.fx.node.map_aggregate(node.args, moved)
        node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
    graph_module.recompile()


def device_of(module: nn.Module) -> torch.device:
    """Where the tensors of `module` are; the CPU if it has none."""
    return next(
        (
            tensor.device
            for tensors in (module.parameters(), module.buffers())
            for tensor in tensors
        ),
        torch.device("cpu"),
    )


def moved_encoding(encoding: Encoding, device: torch.device) -> Encoding:
    """The same numbers there, a single scale too.

    CUDA would take one from the CPU, but multiplies by its reciprocal then, which is not the grid's division. The meta device has no numbers, so they stay.
    """
    if device.type == "meta" or encoding.scale.device == device:
        return encoding
    return replace(encoding, scale=encoding.scale.to(device), offset=encoding.offset.to(device))
