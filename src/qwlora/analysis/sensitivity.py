"""Estimated loss of each activation quantizer, from one forward and backward pass per batch.

    cost = 1/2 sum (g e)^2,     e = x_hat - x,     g = dL/dx

summed over the values x of the activation. This is the second-order term of the loss, with the
diagonal of the empirical Fisher information instead of the Hessian; the first-order term is omitted
because rounding errors have no preferred direction. Costs are taken at the float graph and ignore
how errors add up: use them to rank, and measure the result (`mixed_precision.py`).

Source: Dong et al. 2019 (HAWQ, https://arxiv.org/abs/1905.03696), with Fisher
information as in Li et al. 2021 (BRECQ, https://arxiv.org/abs/2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.grid.encoding import Encoding, sqnr_db
from qwlora.nn.temporary import gradients_disabled
from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.simulation import Simulation
from qwlora.system.progress import Track, untracked

Loss = Callable[[Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one quantizer."""

    name: str
    bitwidth: int  # of its encoding
    cost: float  # estimated increase of the loss, summed over all batches
    sqnr_db: float  # `10 log10 (sum x^2 / sum e^2)`, on the values of the float graph


@dataclass
class _Sums:
    cost: float = 0.0
    signal: float = 0.0
    noise: float = 0.0


def sensitivities(
    simulation: Simulation,
    batches: Collection[Mapping[str, Any]],
    loss: Loss | None = None,
    track: Track = untracked,
) -> list[Sensitivity]:
    """The activation quantizers of a calibrated simulation, most costly first.

    Args:
        batches: the model's arguments; keep them short, all activations are in memory at once.
        loss: maps primary output and batch to a scalar. Default: `next_token_loss`.
    """
    simulation.encodings  # noqa: B018 (raises if not calibrated)
    sums = {name: _Sums() for name in simulation.quantizers}
    leaves: list[Tensor] = []

    def add_cost_node(quantizer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
            leaves.append(output)
        assert isinstance(quantizer, Quantizer)
        result: Tensor = _MeasureCost.apply(output, quantizer.encoding, sums[quantizer.name])
        return result

    with ExitStack() as stack:
        for quantizer in simulation.quantizers.values():
            stack.callback(quantizer.register_forward_hook(add_cost_node).remove)
        # without it, gradients of parameters would make values require gradients before their hook
        stack.enter_context(gradients_disabled(simulation))
        stack.enter_context(simulation.only())
        for batch in track(batches, "measuring sensitivity", len(batches)):
            with torch.enable_grad():
                value = (loss or next_token_loss)(simulation.primary(batch), batch)
            torch.autograd.backward(value, inputs=leaves)
            leaves.clear()
    ranking = [
        Sensitivity(
            name, q.scheme.bitwidth, sums[name].cost, sqnr_db(sums[name].signal, sums[name].noise)
        )
        for name, q in simulation.quantizers.items()
    ]
    return sorted(ranking, key=lambda s: -s.cost)


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Summed cross-entropy of all attended tokens but the first of each sequence, in nats."""
    targets = batch["input_ids"][:, 1:]
    if (mask := batch.get("attention_mask")) is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


class _MeasureCost(torch.autograd.Function):
    """The identity; backward adds the cost of rounding its value to `sums`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoding: Encoding, sums: _Sums) -> Tensor:
        ctx.save_for_backward(x)
        ctx.encoding, ctx.sums = encoding, sums
        return x.clone()  # later operators may overwrite x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            error = ctx.encoding.fake_quantize(x) - x
            ctx.sums.noise += float(error.square().sum())
            ctx.sums.signal += float(x.square().sum())
            ctx.sums.cost += 0.5 * float((error * gradient).square().sum())
        return gradient, None, None
