"""The parameters that tuning changes: the scales of linear layers and the gains of norms.

    W_hat    = (1 + f) * scale * (q + offset)       y = x W_hat^T + b
    gain_hat = (1 + f) * gain                       gain = w, or 1 + w as in Gemma's norms

One f for each scale of a plain linear layer: per tensor, channel or block; for LPBQ one for each
row. A float offset gets the f of its scale. The only scale of a column is the gain of the norm
before the layer, so gains are tuned too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from qwlora.grid.encoding import aligned, grouped
from qwlora.nn import PackedLinear
from qwlora.nn.packed_tensor import Parts, compute_dtype, narrowest
from qwlora.nn.temporary import replaced
from qwlora.nn.weight_view import PackedWeight
from qwlora.quantize.scale_search import storable_scale
from qwlora.system.parameter_names import is_adapter_name

_PUBLISHED = (torch.bfloat16, torch.float16)  # dtypes of checkpoints, the likelier first


class Tunable:
    """The tuned scales and gains of `model`, and their `factors` f by module name."""

    def __init__(self, model: nn.Module):
        modules = dict(model.named_modules())
        self.layers = {
            name: module
            for name, module in modules.items()
            if type(module) is PackedLinear and not module.is_tied
        }
        self.factors = {
            name: nn.Parameter(torch.zeros_like(layer.tensor.parts.scale, dtype=torch.float32))
            for name, layer in self.layers.items()
        }
        self.norms: dict[str, Any] = {}
        self._gains: dict[str, tuple[nn.Parameter, float]] = {}  # f and constant
        by_weight: dict[int, nn.Parameter] = {}
        for name, module in modules.items():
            if is_adapter_name(f"{name}.weight") or (constant := gain_constant(module)) is None:
                continue
            weight = cast(nn.Parameter, module.weight)
            if id(weight) not in by_weight:  # norms that share a weight share its factor
                self.factors[name] = by_weight[id(weight)] = nn.Parameter(
                    torch.zeros_like(weight, dtype=torch.float32)
                )
            self.norms[name], self._gains[name] = module, (by_weight[id(weight)], constant)

    def by_rate(self, highest: float) -> dict[float, list[nn.Parameter]]:
        groups: dict[float, list[nn.Parameter]] = {}
        for name, factor in self.factors.items():
            share = 1.0
            if layer := self.layers.get(name):
                weights = math.prod(layer.tensor.shape) / factor.numel()
                # A change of the scale moves a weight by up to 2^(b - 1) times that change, and few
                # weights give a noisy gradient: at the full rate, 4 bits in blocks of 32 get worse
                # (KL 0.059 to 0.113, docs/log/tuning.md).
                share = min(1.0, math.sqrt(weights) / 2**layer.scheme.bitwidth)
            groups.setdefault(highest * share, []).append(factor)
        return groups

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Inside the block, tuned values are multiplied by `1 + f`, and f gets gradients."""
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                forward: Any = partial(_forward, layer, self.factors[name])
                stack.enter_context(replaced(layer, forward))
            for name, norm in self.norms.items():
                forward = partial(_with_gain, norm, norm.forward, self._gains[name])
                stack.enter_context(replaced(norm, forward))
            yield

    def state(self) -> dict[str, Parts | Tensor]:
        return {name: layer.tensor.parts for name, layer in self.layers.items()} | {
            name: norm.weight.detach().clone() for name, norm in self.norms.items()
        }

    @torch.no_grad()
    def multiply_(self) -> None:
        """Multiply the tuned values in the modules by `1 + f`."""
        for name, layer in self.layers.items():
            parts = layer.tensor.parts
            old = parts.scale.float()
            new = layer.scheme.granularity.nearest(old * (1 + self.factors[name]))
            # Scales of blocks stay representable in float16, which a GGUF file stores.
            if layer.scheme.granularity.is_free:
                new = storable_scale(new)
            layer.scale = narrowest(new)
            if parts.minimum is not None:
                layer.minimum = narrowest(parts.minimum.float() * (new / old))
        for name, norm in self.norms.items():
            if name in self.factors:
                # Keep the checkpoint's precision: float32 copies of bfloat16 weights are rounded.
                dtype = narrowest(norm.weight, (*_PUBLISHED, norm.weight.dtype)).dtype
                norm.weight.copy_(_tuned_gain(norm.weight, *self._gains[name]).to(dtype))

    @torch.no_grad()
    def restore_(self, state: Mapping[str, Any]) -> None:
        for name, layer in self.layers.items():
            layer.scale, layer.minimum = state[name].scale, state[name].minimum
        for name, norm in self.norms.items():
            norm.weight.copy_(state[name])


@torch.no_grad()
def gain_constant(module: nn.Module) -> float | None:
    """0 if `module` multiplies its channels by `w`, 1 if by `1 + w`. None if it does neither or has
    other state."""
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 1 or not weight.is_floating_point():
        return None
    if [*module.children(), *module.buffers()]:
        return None
    # Probed with numbers, because no class or attribute tells how a norm uses its weight.
    x = torch.linspace(-1, 2, 2 * len(weight), device=weight.device).view(2, -1)
    others = {
        name: torch.zeros_like(parameter, dtype=torch.float32)
        for name, parameter in module.named_parameters(recurse=False)
        if name != "weight"
    }

    def output(w: float) -> Any:
        full = torch.full_like(weight, w, dtype=torch.float32)
        return functional_call(module, {"weight": full, **others}, (x,))

    try:
        at_0, at_1, at_2 = output(0.0), output(1.0), output(2.0)
    except (RuntimeError, TypeError, ValueError):
        return None
    if not all(isinstance(y, Tensor) and y.shape == x.shape for y in (at_0, at_1, at_2)):
        return None
    slope = at_1 - at_0
    if not torch.allclose(at_2 - at_1, slope, atol=1e-5):
        return None
    if not bool(at_0.any()):
        return 0.0
    return 1.0 if torch.allclose(at_0, slope, atol=1e-5) else None


def _tuned_gain(weight: Tensor, factor: Tensor, constant: float) -> Tensor:
    """The weight of a norm whose gain, `constant + w`, is multiplied by `1 + f`."""
    return (weight + factor * (constant + weight)).to(weight.dtype)


def _with_gain(norm: nn.Module, forward: Any, gain: tuple[Tensor, float], *args: Any) -> Any:
    parameters: dict[str, Any] = norm._parameters
    weight = parameters["weight"]
    parameters["weight"] = _tuned_gain(weight, *gain)
    try:
        return forward(*args)
    finally:
        parameters["weight"] = weight


def _forward(layer: PackedLinear, factor: Tensor, x: Tensor) -> Any:
    return _TunedProduct.apply(x, factor, layer.bias, layer.packed_weight)


class _TunedProduct(torch.autograd.Function):
    """`y = x ((1 + f) W)^T + b`; `dL/df` is `dL/dW * W` summed over the weights of a scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, bias: Tensor | None, part: PackedWeight
    ) -> Tensor:
        ctx.packed_weight, ctx.dtype, ctx.x_dtype = part, compute_dtype(x), x.dtype
        x = x.to(ctx.dtype)
        ctx.save_for_backward(x, factor)
        weight = _tuned(part, part.unpacked(torch.float32), factor).to(ctx.dtype)
        return F.linear(x, weight, None if bias is None else bias.to(ctx.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        (x, factor), part = ctx.saved_tensors, ctx.packed_weight
        # Unpacked again: saving W would hold a float model.
        values, of_x = part.unpacked(torch.float32), None
        if ctx.needs_input_grad[0]:
            of_x = (gradient @ _tuned(part, values, factor).to(ctx.dtype)).to(ctx.x_dtype)
        rows = gradient.reshape(-1, gradient.shape[-1])
        of_weight = (rows.mT @ x.reshape(-1, x.shape[-1])).float().mul_(values)
        granularity = part.owner.scheme.granularity
        shape = aligned(factor, granularity, 2).shape
        of_factor = grouped(of_weight, granularity).sum_to_size(shape).view(factor.shape)
        return of_x, of_factor, None, None


def _tuned(part: PackedWeight, values: Tensor, factor: Tensor) -> Tensor:
    granularity = part.owner.scheme.granularity
    return (grouped(values, granularity) * (1 + aligned(factor, granularity, 2))).view(values.shape)
