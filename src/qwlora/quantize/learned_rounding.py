"""Learned rounding: move codes of a block's layers by one step, so that the block's output comes
closer to that of its float weights.

    L = mean over tokens  |y_hat_t - y_t|^2 / |y_t|^2
    W_hat = s clamp(round(u), lowest, highest)
    u = n + clamp(W / s - n, -0.49, 0.49) + V,     |V| <= 1/2
    V <- V - rate (1 - i / steps) / steps * sign(dL / dV)     in step i, from V = 0

n are the solver's codes plus offset, so V = 0 gives its weight; scales and offsets stay. y and
y_hat are the outputs of the float block and of the block on its codes, on the inputs that the
quantized blocks before it give. The gradient of rounding is 1, and 0 where a code is clamped.

The result are the codes with the least loss on held-out batches, the solver's own if none have
less. Memory: five numbers per weight of the block, its activations for one batch, and y of all.

Source: AutoRound (Cheng et al. 2023, https://arxiv.org/abs/2309.05516), which starts at the nearest
codes and learns ranges as well (docs/log/solvers.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import QuantizedTensor, aligned, grouped
from qwlora.nn import tensor_out_in
from qwlora.nn.temporary import gradients_disabled
from qwlora.quantize.block_runner import BlockRunner, held_out_count
from qwlora.quantize.gptq import GptqSettings
from qwlora.quantize.layer_rules import Assignment
from qwlora.quantize.layer_statistics import tensors_in, token_lengths

_BATCHES = 2  # per step
_CHECKS = 8  # of the loss on what is held out
_FARTHEST = 0.49  # from a code, at the start: just not the next one


def rounding_settings(
    path: str, plan: Mapping[str, Assignment], tensors: Sequence[str]
) -> dict[str, GptqSettings]:
    """The settings of the tensors of block `path` whose rounding is learned. A layer that is the
    whole block, such as a head, has nothing to compensate."""
    return {
        name: settings
        for name in tensors
        if isinstance(settings := plan[name].settings, GptqSettings)
        and settings.rounding_steps
        and name != f"{path}.weight"
    }


def learn_rounding(
    model: nn.Module,
    path: str,
    solved: Mapping[str, QuantizedTensor],
    learned: Mapping[str, GptqSettings],
    runner: BlockRunner,
) -> tuple[dict[str, QuantizedTensor], float]:
    """Better codes for the tensors in `learned`, of the block at which `runner` has arrived.

    Args:
        solved: all tensors of the block that are quantized; the model still has the float ones.

    Returns:
        The tensors, and the block's loss on the held-out batches relative to that of the solver's
        codes: 1 if these are kept.

    Raises:
        CalibrationError: there is only one batch.
    """
    count, settings = len(runner.batches), next(iter(learned.values()))
    if count < 2:
        raise CalibrationError(
            "learned rounding takes at least two sequences: one is held out to check whether it "
            "helped. Use more calibration data, or rounding_steps: 0"
        )
    training, steps = count - held_out_count(count), settings.rounding_steps
    generator, order = torch.Generator().manual_seed(0), list[int]()
    with ExitStack() as stack:
        stack.enter_context(gradients_disabled(model.get_submodule(path)))
        for name in solved:  # copies of the float weights, which change until the stack is closed
            owner, _, key = name.rpartition(".")
            module = model.get_submodule(owner)
            weight = cast(nn.Parameter, module._parameters[key])
            stack.callback(setattr, module, key, weight)
            setattr(module, key, nn.Parameter(weight.detach().clone(), name in learned))
        block = _Block(runner)
        layers = {name: _Codes(model, name, solved[name]) for name in learned}
        for name in solved.keys() - learned.keys():
            with torch.no_grad():
                tensor_out_in(model, name).copy_(solved[name].dequantize())
        held_out = range(training, count)
        before = least = block.loss(held_out)
        best = {name: solved[name].codes for name in learned}
        for step in range(steps):
            while len(order) < _BATCHES:
                order += torch.randperm(training, generator=generator).tolist()
            block.loss([order.pop(0) for _ in range(_BATCHES)], backward=True)
            for layer in layers.values():
                layer.descend_(settings.rounding_rate * (1 - step / steps) / steps)
            is_due = (step + 1) % max(1, steps // _CHECKS) == 0
            if is_due and (loss := block.loss(held_out)) < least:
                least, best = loss, {name: layer.codes for name, layer in layers.items()}
    better = {name: replace(solved[name], codes=codes) for name, codes in best.items()}
    return better, least / before if before else 1.0


class _Block:
    """The block at which `runner` has arrived, and its outputs with the weights it has now."""

    def __init__(self, runner: BlockRunner):
        self.runner, self.place = runner, 0
        results, places = list[list[Tensor]](), set[int]()
        with torch.enable_grad():
            for result in runner.repeat():
                tensors = list(tensors_in(result))
                places |= {i for i, y in enumerate(tensors) if y.requires_grad}
                results.append([y.detach() for y in tensors])
                del result, tensors  # and the graph, before the next batch runs
        self.place = min(places)  # some depend on the layers: layer_statistics.py has checked
        self.wanted = [tensors[self.place] for tensors in results]

    def loss(self, batches: Sequence[int], backward: bool = False) -> float:
        """L over some batches; with `backward`, the weights get its gradient."""
        total = 0.0
        with torch.set_grad_enabled(backward):
            for i, result in zip(batches, self.runner.repeat(batches), strict=True):
                y, wanted = list(tensors_in(result))[self.place], self.wanted[i]
                error = (y.float() - wanted.float()).square().sum(-1, keepdim=True)
                loss = (error / token_lengths(wanted).square()).mean()
                if loss.requires_grad:  # not if every token went to experts that are not learned
                    loss.backward()
                total += float(loss.detach())
        return total / len(batches)


class _Codes:
    """The codes of one layer while they are learned; its weight follows them."""

    def __init__(self, model: nn.Module, name: str, solved: QuantizedTensor):
        module, encoding = model.get_submodule(name.removesuffix(".weight")), solved.encoding
        self.weight = cast(nn.Parameter, module.weight)
        self.is_transposed = isinstance(module, Conv1D)
        self.shape, self.granularity = solved.codes.shape, encoding.scheme.granularity
        self.scale, self.lowest = (
            aligned(numbers.float(), self.granularity, 2)
            for numbers in (encoding.scale, encoding.offset)
        )
        self.highest = self.lowest + encoding.scheme.steps
        n = grouped(solved.codes.float(), self.granularity) + self.lowest
        off = self._grouped(self.weight.detach()) / self.scale - n
        self.start = n + off.clamp_(-_FARTHEST, _FARTHEST)
        self.u = self.start.clone()
        self._write()

    @property
    def codes(self) -> Tensor:
        return (self._steps() - self.lowest).to(torch.uint8).reshape(self.shape)

    def descend_(self, rate: float) -> None:
        """One step of V along the sign of the gradient, which is removed."""
        if (gradient := self.weight.grad) is None:  # no token reached the layer
            return
        n, direction = self.u.round(), (self._grouped(gradient) * self.scale).sign_()
        direction.masked_fill_((n < self.lowest) | (n > self.highest), 0)
        self.u.sub_(direction, alpha=rate)
        torch.clamp(self.u, self.start - 0.5, self.start + 0.5, out=self.u)
        self.weight.grad = None
        self._write()

    def _steps(self) -> Tensor:
        return self.u.round().clamp_(self.lowest, self.highest)

    @torch.no_grad()
    def _write(self) -> None:
        values = (self._steps() * self.scale).reshape(self.shape)
        self.weight.copy_(values.T if self.is_transposed else values)

    def _grouped(self, weight: Tensor) -> Tensor:
        return grouped((weight.T if self.is_transposed else weight).float(), self.granularity)
