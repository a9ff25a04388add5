"""Second moments of the inputs and output gradients of a block's layers, with tokens weighted by
how much they matter.

    R = sum_t w_t x_t x_t^T / sum_t w_t     [in, in],     w_t = |g_t|^2
    G = mean_t g_t g_t^T                    [out, out],   g_t = dp / dz_t
    p = sum_s r_s . y_s / |y_s|,            r ~ N(0, 1)

x_t and z_t are a layer's input and output at token t, y_s the block's output at token s. The mean
of w_t over r is `sum_s |dy_s / dz_t|_F^2 / |y_s|^2` (Hutchinson's estimator, one probe per batch):
the relative change of the block's output per error of the layer at token t.

GuidedQuant (Kim et al. 2025, https://arxiv.org/abs/2505.07004) uses the gradient of the loss; this
needs no loss and only one block of the model. K-FAC (Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671) shows that the cost of an error is nearly a product of two such
moments.

y is the first tensor in the block's result that depends on its layers. Masked tokens count like
others, so calibration data should have no padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from qwlora.errors import CalibrationError
from qwlora.grid.second_moments import LayerMoments, SecondMoment
from qwlora.nn.temporary import gradients_disabled
from qwlora.quantize.block_runner import BlockRunner
from qwlora.system.device import device_of
from qwlora.system.parameter_names import canonical_name
from qwlora.system.processes import gathered, share, summed

_SHORTEST = 0.1  # of the median length of an output: what is shorter counts as this long


@dataclass
class Observed:
    """Running R and, if requested, G of one layer."""

    input: SecondMoment
    output: SecondMoment | None

    @property
    def moment(self) -> LayerMoments:
        return LayerMoments(self.input.matrix, None if self.output is None else self.output.matrix)


def observe(
    model: nn.Module, block: str, tensors: Sequence[str], runner: BlockRunner, outputs: bool = True
) -> dict[str, Observed]:
    """Run the block at which `runner` has arrived, and return R and, with `outputs`, G of each
    matrix product in `tensors` whose errors change the block's output. Processes that share the
    batches get the moments of all batches."""
    modules = {
        name: model.get_submodule(name.removesuffix(".weight"))
        for name in tensors
        if name.endswith(".weight")
    }
    products = {name: m for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    if not products:
        return {}
    # If a layer is the whole block, such as a head, its G would be a multiple of the identity.
    statistics = {
        name: Observed(
            SecondMoment(), SecondMoment() if outputs and name != f"{block}.weight" else None
        )
        for name in products
    }
    with (
        torch.enable_grad(),
        gradients_disabled(model.get_submodule(block)),
        _recorded(products) as calls,
    ):
        seed, count = share()
        for result in runner.repeat():
            if calls:
                outputs_of_calls = [z for _, _, z in calls]
                gradients = _gradients(canonical_name(block), result, outputs_of_calls, seed)
                for (name, x, _), gradient in zip(calls, gradients, strict=True):
                    if gradient is not None:
                        _add_call(statistics[name], name, x, gradient)
                del gradients, gradient, x, outputs_of_calls
            # Nothing of this batch is in memory while the next one runs.
            del result
            calls.clear()
            # The seed is the batch's number among those of all processes, so that several processes
            # draw the probes that one would.
            seed += count
    if count > 1:
        for observed in statistics.values():
            for moment in filter(None, (observed.input, observed.output)):
                _add_processes(moment, device_of(model.get_submodule(block)))
    return {name: observed for name, observed in statistics.items() if observed.input.weight > 0}


def _add_call(observed: Observed, name: str, x: Tensor, gradient: Tensor) -> None:
    # Nearly all tokens attend to the first one, so errors in its value reach every output. But its
    # hidden state is so large that the next norm removes errors in it. Without weights, R ignores
    # the first effect and is dominated by the second: perplexity 21.80 at 4 bits in blocks of 32
    # with long inputs bounded, 19.90 with these weights (docs/log/solvers.md).
    try:
        observed.input.update(x, gradient.float().square().sum(-1))
        if observed.output is not None:
            observed.output.update(gradient)
    except CalibrationError as error:
        raise CalibrationError(f"{canonical_name(name)}: {error}") from error


def _add_processes(moment: SecondMoment, device: torch.device) -> None:
    # In one of the processes, an expert may get no token and so have no total.
    parts = gathered((moment.weight, 0 if moment.total is None else len(moment.total)))
    moment.weight = sum(weight for weight, _ in parts)
    if (width := max(width for _, width in parts)) and moment.total is None:
        moment.total = torch.zeros(width, width, device=device)
    if moment.total is not None:
        moment.total = summed(moment.total)


def _gradients(
    block: str, result: Any, outputs: Sequence[Tensor], seed: int
) -> Sequence[Tensor | None]:
    """dp / dz of each of the layers' outputs."""
    remedy = (
        "which gptq and init qera need. For its layers use solver search (by a rule), "
        "and init zero or svd."
    )
    try:
        for y in _tensors_in(result):
            if y.requires_grad:
                length = _token_lengths(y)
                # Drawn on the CPU, so that all devices have the same probe.
                r = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
                probe = (r.to(length) / length).to(y)
                gradients = torch.autograd.grad(
                    y, outputs, probe, retain_graph=True, allow_unused=True
                )
                if any(gradient is not None for gradient in gradients):
                    return gradients
    except (RuntimeError, NotImplementedError) as error:
        raise CalibrationError(f"{block} cannot be differentiated ({error}), {remedy}") from error
    raise CalibrationError(
        f"no tensor in the result of {block} can be differentiated back to its layers, {remedy}"
    )


def _token_lengths(y: Tensor) -> Tensor:
    """|y_t| of each token [..., 1], float32; at least a tenth of their median."""
    length = y.detach().float().norm(dim=-1, keepdim=True)
    usual = length[length > 0]
    shortest = _SHORTEST * usual.median() if usual.numel() else torch.ones_like(length)
    return length.maximum(shortest)


def _tensors_in(result: Any) -> Iterator[Tensor]:
    """Tensors in a nested result, including the fields of dataclasses."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                yield from _tensors_in(getattr(leaf, field.name))


@contextmanager
def _recorded(products: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, Tensor, Tensor]]]:
    """(name, input, output) of every call of the layers."""
    calls: list[tuple[str, Tensor, Tensor]] = []
    names = {module: name for name, module in products.items()}

    def record(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Tensor | None:
        # Llama 4's router is a Linear that returns a tuple.
        if not isinstance(output, Tensor):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        # Copies, because a model may change input or output in place.
        calls.append((names[module], x.detach().clone(), output.requires_grad_()))
        return output.clone()

    with ExitStack() as stack:
        for module in names:
            stack.enter_context(module.register_forward_hook(record, with_kwargs=True))
        yield calls
