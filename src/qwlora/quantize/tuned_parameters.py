"""The parameters that tuning changes: the scales of linear layers and the gains of norms.

    W_hat    = (1 + f) * scale * (q + offset)       y = x W_hat^T + b
    gain_hat = (1 + f) * gain                       gain = w, or 1 + w as in Gemma's norms

Scales are those of plain linear layers: per tensor, channel or block; for LPBQ, per row. A float
offset is multiplied like its scale. Scales of blocks stay representable in float16. Norms tune the
columns, which have no scale otherwise. How a norm uses its weight is found by probing it with
numbers, and the weight keeps a dtype that holds it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrize import (
    is_parametrized,
    register_parametrization,
    remove_parametrizations,
)

from qwlora.grid.encoding import aligned, grouped
from qwlora.grid.scheme import PerBlock
from qwlora.nn import PackedLayer, PackedLinear, is_packed
from qwlora.nn.packed_matmul import PackedWeight
from qwlora.nn.packed_tensor import Parts, compute_dtype, narrowest
from qwlora.nn.replaced import replaced
from qwlora.parameter_names import is_adapter_name
from qwlora.quantize.scale_search import storable_scale

_CHECKPOINTS = (
    torch.bfloat16,
    torch.float16,
)  # types that models are published in, the likelier first


class Tunable:
    """What is tuned in `model`, and by how much: `factors`, by module name."""

    def __init__(self, model: nn.Module):
        modules = dict(model.named_modules())
        self.layers = {
            name: m
            for name, m in modules.items()
            if type(m) is PackedLinear and is_packed(m) and not m.is_tied
        }
        gains = {
            name: _gain_offset(m)
            for name, m in modules.items()
            if not is_adapter_name(f"{name}.weight")
        }
        self.norms: dict[str, Any] = {
            name: modules[name] for name, beside in gains.items() if beside is not None
        }
        self.factors = {
            name: _factor(layer.tensor.parts.scale) for name, layer in self.layers.items()
        }
        by_weight: dict[
            int, _Times
        ] = {}  # norms that share a weight share its factor, under the first one's name
        for name, norm in self.norms.items():
            if id(norm.weight) not in by_weight:
                self.factors[name] = _factor(norm.weight)
                by_weight[id(norm.weight)] = _Times(self.factors[name], gains[name] or 0.0)
        self._times = {name: by_weight[id(norm.weight)] for name, norm in self.norms.items()}

    def by_rate(self, highest: float) -> dict[float, list[nn.Parameter]]:
        """The factors, grouped by learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name, factor in self.factors.items():
            layer, share = self.layers.get(name), 1.0
            if layer is not None:
                share = (
                    math.sqrt(math.prod(layer.tensor.shape) / factor.numel())
                    / 2**layer.scheme.bitwidth
                )
            groups.setdefault(highest * min(1.0, share), []).append(factor)
        return groups

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside the block, the model computes with everything multiplied by `1 + f`, and f gets
        gradients.
        """
        order = {name: list(norm._parameters) for name, norm in self.norms.items()}
        try:
            with ExitStack() as stack:
                for name, layer in self.layers.items():
                    forward = partial(_forward, layer, self.factors[name])
                    stack.enter_context(replaced(layer, forward))
                for name, norm in self.norms.items():
                    register_parametrization(norm, "weight", self._times[name])
                yield
        finally:
            for name, norm in self.norms.items():
                if is_parametrized(norm, "weight"):
                    remove_parametrizations(norm, "weight", leave_parametrized=False)
                    for key in order[name]:
                        norm._parameters[key] = norm._parameters.pop(key)

    def state(self) -> dict[str, Parts | Tensor]:
        """The current scales and gains, by name."""
        return {name: layer.tensor.parts for name, layer in self.layers.items()} | {
            name: norm.weight.detach().clone() for name, norm in self.norms.items()
        }

    @torch.no_grad()
    def multiply_(self) -> None:
        """Store everything multiplied by `1 + f` in the modules."""
        for name, layer in self.layers.items():
            _multiply_(layer, 1 + self.factors[name])
        for name, norm in self.norms.items():
            if name in self.factors:
                norm.weight.copy_(
                    self._times[name](norm.weight).to(
                        narrowest(norm.weight, (*_CHECKPOINTS, norm.weight.dtype)).dtype
                    )
                )

    @torch.no_grad()
    def restore_(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        for name, layer in self.layers.items():
            layer.scale, layer.minimum = state[name].scale, state[name].minimum
        for name, norm in self.norms.items():
            norm.weight.copy_(state[name])


def _factor(numbers: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.zeros_like(numbers, dtype=torch.float32))


@torch.no_grad()
def _gain_offset(module: nn.Module) -> float | None:
    """0 if `module` multiplies its channels by `w`, 1 if by `1 + w`; None if neither, or if it has
    state of its own. None is not tuned.
    """
    weight = module._parameters.get("weight")
    if (
        weight is None
        or weight.ndim != 1
        or not weight.is_floating_point()
        or [*module.children(), *module.buffers()]
    ):
        return None
    x = torch.linspace(-1, 2, 2 * len(weight), device=weight.device).view(2, -1)
    others = {
        name: torch.zeros_like(p, dtype=torch.float32)
        for name, p in module.named_parameters(recurse=False)
        if name != "weight"
    }
    try:
        at = [
            functional_call(
                module, {"weight": torch.full_like(weight, w, dtype=torch.float32), **others}, (x,)
            )
            for w in (0.0, 1.0, 2.0)
        ]
    except (RuntimeError, TypeError, ValueError):
        return None
    if not all(isinstance(y, Tensor) and y.shape == x.shape for y in at) or not torch.allclose(
        at[2] - at[1], at[1] - at[0], atol=1e-5
    ):
        return None
    if not bool(at[0].any()):
        return 0.0
    return 1.0 if torch.allclose(at[0], at[1] - at[0], atol=1e-5) else None


class _Times(nn.Module):
    """Parametrization of `w` that multiplies the gain by `1 + f`. f is in a tuple so that it is not
    a parameter of the model.
    """

    def __init__(self, factor: nn.Parameter, beside: float):
        super().__init__()
        self.factor, self.beside = (factor,), beside

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + self.factor[0] * (self.beside + weight)).to(weight.dtype)


def _forward(layer: PackedLinear, factor: Tensor, x: Tensor) -> Tensor:
    y: Tensor = _TunedProduct.apply(x, factor, layer.bias, layer.packed_weight)
    return y


class _TunedProduct(torch.autograd.Function):
    """`y = x ((1 + f) W)^T + b`. W is unpacked again for backward; `dL/df` is `dL/dW * W` summed
    over the weights that share a scale.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, bias: Tensor | None, part: PackedWeight
    ) -> Tensor:
        ctx.packed_weight, ctx.dtype, ctx.x_dtype = part, compute_dtype(x), x.dtype
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x, factor)
        return F.linear(
            x,
            _times(part, part.unpacked(torch.float32), factor).to(ctx.dtype),
            None if bias is None else bias.to(ctx.dtype),
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, factor = ctx.saved_tensors
        values = ctx.packed_weight.unpacked(torch.float32)
        of_x = (
            (gradient @ _times(ctx.packed_weight, values, factor).to(ctx.dtype)).to(ctx.x_dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        of_weight = (
            gradient.reshape(-1, gradient.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        ).float()
        granularity = ctx.packed_weight.owner.scheme.granularity
        return (
            of_x,
            grouped(of_weight.mul_(values), granularity)
            .sum_to_size(_aligned(ctx.packed_weight, factor).shape)
            .view(factor.shape),
            None,
            None,
        )


def _times(
    part: PackedWeight, values: Float[Tensor, "out in"], factor: Tensor
) -> Float[Tensor, "out in"]:
    return (grouped(values, part.owner.scheme.granularity) * (1 + _aligned(part, factor))).view(
        values.shape
    )


def _aligned(part: PackedWeight, factor: Tensor) -> Tensor:
    return aligned(factor, part.owner.scheme.granularity, len(part.shape))


def _multiply_(layer: PackedLayer, factor: Tensor) -> None:
    """Multiply the layer's scales, and its float offsets, by `factor`."""
    parts, granularity = layer.tensor.parts, layer.scheme.granularity
    scale = parts.scale.float() * factor
    if isinstance(granularity, PerBlock):
        scale = storable_scale(scale)
    layer.scale = narrowest(scale)
    if parts.minimum is not None:
        layer.minimum = narrowest(parts.minimum.float() * (scale / parts.scale.float()))
