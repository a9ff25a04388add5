"""What the layers of a part see, and how much each token of it matters.

    R = sum_t w_t x_t x_t^T / sum_t w_t          [in, in],        w_t = |dp / dz_t|^2,        p = sum_s r_s . y_s / |y_s|,        r ~ N(0, 1)

x_t and z_t are a layer's input and output at token t, y_s the part's output at token s. Over r, w_t is the mean of `sum_s |dy_s / dz_t|^2 / |y_s|^2`
(Hutchinson's estimator, one probe a batch): by how much an error of the layer at token t moves what the part makes, relative to its size.

A language model's tokens are far from alike. Nearly all of them attend to the first one, so an error in its value moves every output; and where its hidden
state is thousands of times longer than the others', the norm that reads it makes that error vanish. With `w_t = 1` the first is lost among the rest, and the
second is all of R. GuidedQuant (Kim et al. 2025, https://arxiv.org/abs/2505.07004) takes the gradient of the loss for p; this needs no loss, and no more of the
model than one part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from qwlora.base.lockstep import Lockstep
from qwlora.errors import CalibrationError
from qwlora.grid.moment import SecondMoment
from qwlora.grid.names import canonical_name

_SHORTEST = 0.1  # of the median length of an output: what is shorter (padding) counts as this long


def observe(model: nn.Module, part: str, tensors: Sequence[str], lockstep: Lockstep) -> dict[str, SecondMoment]:
    """Run the part that `lockstep` stands before, and give R for each of its matrix products in `tensors`.

    Raises:
        CalibrationError: the part's output does not depend on its layers in a way that can be differentiated, or an input holds nan or infinity.
    """
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in tensors if name.endswith(".weight")}
    products = {name: module for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
    found: dict[str, SecondMoment] = {}
    with torch.enable_grad(), _recorded(products) as calls:
        for number, outputs in enumerate(lockstep.repeat()):
            if not calls:
                continue
            generator = torch.Generator().manual_seed(number)
            probed = [(y, _probe(y, generator)) for y in tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
            if not probed:
                raise CalibrationError(
                    f"{canonical_name(part)} cannot be differentiated, which solver gptq and init qera need; use solver search, init zero or svd"
                )
            names, inputs, made = zip(*calls, strict=True)
            gradients = torch.autograd.grad([y for y, _ in probed], made, [r for _, r in probed], allow_unused=True)
            for name, x, gradient in zip(names, inputs, gradients, strict=True):
                weights = x.new_zeros(x.shape[:-1]) if gradient is None else gradient.square().sum(-1)
                found.setdefault(name, SecondMoment()).update(x, weights)
            calls.clear()
    return found


@contextmanager
def _recorded(products: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(name, input, output) of every call of the layers."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def record(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            calls.append((name, x.detach(), output.requires_grad_()))
            return output.clone()  # which the model may change in place

        return hook

    hooks = [module.register_forward_hook(record(name), with_kwargs=True) for name, module in products.items()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _probe(output: Float[Tensor, "*tokens features"], generator: torch.Generator) -> Float[Tensor, "*tokens features"]:
    """`r / |y|`."""
    length = output.detach().norm(dim=-1, keepdim=True)
    shortest = (_SHORTEST * length.median()).clamp(min=torch.finfo(output.dtype).tiny ** 0.5)
    return torch.randn(output.shape, generator=generator).to(output) / length.maximum(shortest)
