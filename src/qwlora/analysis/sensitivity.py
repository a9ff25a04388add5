"""What each quantizer costs, from one forward and one backward pass of the float graph a batch.

    cost = 1/2 sum (g e)^2,     e = x_hat - x,     g = dL/dx           summed over the values x that pass the quantizer

The second-order term of the loss with the diagonal of the empirical Fisher information in the place of the Hessian; the first-order term is left out, since
errors of rounding have no direction of their own. All costs are taken at the float graph, so they say nothing of how errors add up: they rank, and whoever
chooses by them measures afterwards (`suggest.py`).

Source of the criterion: Dong et al. 2019 (HAWQ, https://arxiv.org/abs/1905.03696), with Fisher information as in Li et al. 2021 (BRECQ,
https://arxiv.org/abs/2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.grid.encoding import Encoding
from qwlora.grid.sqnr import sqnr_db
from qwlora.nn.frozen import gradients_disabled
from qwlora.progress import Track, untracked
from qwlora.simulation.fake_quantizer import Quantizer
from qwlora.simulation.simulation import Simulation

Loss = Callable[[Tensor, Mapping[str, Any]], Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """One quantizer.

    Args:
        bitwidth: of its encoding.
        cost: estimated increase of the loss over all batches, in the loss's unit.
        sqnr_db: `10 log10 (sum x^2 / sum e^2)`, of the value as the float graph makes it.
    """

    name: str
    bitwidth: int
    cost: float
    sqnr_db: float


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
    """The activation quantizers of a calibrated simulation, the dearest first.

    Args:
        batches: the model's arguments; short ones do, since every value is in memory at once.
        loss: from the graph's primary output and the batch to a scalar; by default the summed cross-entropy of the next token of `input_ids`.

    Raises:
        CalibrationError: an activation has no encoding yet.
    """
    simulation.encodings  # noqa: B018 (raises before anything is run)
    found = {name: _Sums() for name in simulation.quantizers}
    leaves: list[Tensor] = []
    hooks = [
        q.register_forward_hook(partial(_sense, found[name], leaves))
        for name, q in simulation.quantizers.items()
    ]
    try:
        with (
            gradients_disabled(simulation),
            simulation.only(),
        ):  # gradients would reach values through parameters before they are sensed
            for batch in track(batches, "measuring sensitivity", len(batches)):
                with torch.enable_grad():
                    value = (loss or next_token_loss)(simulation.primary(batch), batch)
                torch.autograd.backward(value, inputs=leaves)
                leaves.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(
        (_finished(simulation.quantizers[name], sums) for name, sums in found.items()),
        key=lambda s: -s.cost,
    )


def next_token_loss(logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Sum over the tokens that are attended to, but each sequence's first, in nats."""
    targets = batch["input_ids"][:, 1:]
    if (mask := batch.get("attention_mask")) is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )


def _finished(quantizer: Quantizer, sums: _Sums) -> Sensitivity:
    return Sensitivity(
        quantizer.name, quantizer.scheme.bitwidth, sums.cost, sqnr_db(sums.signal, sums.noise)
    )


def _sense(
    sums: _Sums, leaves: list[Tensor], quantizer: nn.Module, args: tuple[Any, ...], output: Tensor
) -> Tensor:
    """Stand behind a quantizer that lets floats pass; a value that no gradient reaches yet begins a graph of its own."""
    if not output.requires_grad:
        output = output.detach().requires_grad_()
        leaves.append(output)
    sensed: Tensor = _Sense.apply(output, quantizer.encoding, sums)
    return sensed


class _Sense(torch.autograd.Function):
    """The identity; on the way back it adds up what rounding its value would cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoding: Encoding, sums: _Sums) -> Tensor:
        ctx.save_for_backward(x)
        ctx.encoding, ctx.sums = encoding, sums
        return x.clone()  # the model may go on in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            error = ctx.encoding.fake_quantize(x) - x
            ctx.sums.noise += float(error.square().sum())
            ctx.sums.signal += float(x.square().sum())
            ctx.sums.cost += 0.5 * float((error * gradient).square().sum())
        return gradient, None, None
