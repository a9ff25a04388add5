"""Another, equally valid float32 computation of a graph.

Its distance to the graph's own outputs is the noise floor between two correct runtimes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter

_aten = torch.ops.aten


class SumInHalves(Interpreter):
    """Runs a graph with each sum over k of a matrix product or convolution in two halves."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _aten.linear.default:
            x, weight, *bias = args
            half = x.shape[-1] // 2
            first = nn.functional.linear(x[..., :half], weight[:, :half], *bias)
            return first + nn.functional.linear(x[..., half:], weight[:, half:])
        if target in (_aten.matmul.default, _aten.bmm.default) and args[1].ndim > 1:
            a, b = args
            half = a.shape[-1] // 2
            return a[..., :half] @ b[..., :half, :] + a[..., half:] @ b[..., half:, :]
        if target in (_aten.conv1d.default, _aten.conv2d.default):
            return self._convolution(target, *args)
        return super().call_function(target, args, kwargs)

    def _convolution(
        self, target: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any
    ) -> Tensor:
        half = weight.shape[1] // 2
        if not half or weight.shape[1] != x.shape[1]:  # one channel, or grouped
            result: Tensor = target(x, weight, bias, *options)
            return result
        return target(x[:, :half], weight[:, :half], bias, *options) + target(
            x[:, half:], weight[:, half:], None, *options
        )
