"""Bits by budget: choose a scheme for each layer with the least predicted loss for a given size.

    minimize   sum over layers c(layer, scheme)     with   sum of bytes <= budget
    c = 1/2 sum_oi G_oo h_i (W - W_hat)_oi^2

G is the second moment of the gradient at the layer's output (`layer_statistics.py`, in the float
model), so c is the relative change of the block's output. h_i is the cost of an error in input i:
R_ii. With gptq, later inputs compensate the error, so h_i is the denominator 1 / U_ii^2 of its
choice of scales (`gptq.py`).

Layers that read the same tensor (q, k and v; gate and up) get one scheme. The choice is then a
knapsack with one item from each group, solved by dynamic programming over bytes.

Source: the second-order cost of HAWQ-V2 (Dong et al. 2019, https://arxiv.org/abs/1911.03852), with
K-FAC's factors in place of the trace of the Hessian.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qwlora.errors import GridError, size
from qwlora.grid.scheme import Blocks, Scheme
from qwlora.nn import tensor_out_in
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.quantize.block_runner import Batches, BlockRunner
from qwlora.quantize.gptq import input_importance
from qwlora.quantize.layer_rules import Assignment, LayerRule, find_tensors
from qwlora.quantize.layer_statistics import observe
from qwlora.quantize.scale_search import search_scale
from qwlora.quantize.solvers import ROUNDING_SOLVERS, SOLVERS
from qwlora.system.parameter_names import by_glob, canonical_name
from qwlora.system.progress import Track

_UNITS = 2**16  # of bytes, for the knapsack: rounding wastes at most one per group


@dataclass(frozen=True)
class BitBudget:
    """The size limit of all packed layers together, scales and offsets included.

    Args:
        bits, bytes: average bits per weight, or total size in bytes. Give one of them.
        schemes: the schemes to choose from. Default: the scheme of the base with 2 to 8 bits, and
            with blocks of other sizes (`similar_schemes`).
    """

    bits: float | None = None
    bytes: float | None = None
    schemes: Sequence[Scheme] = ()


class _Choice(NamedTuple):
    scheme: Scheme
    size: int
    cost: float


def budget_rules(
    model: nn.Module,
    plan: Mapping[str, Assignment],
    rules: Sequence[LayerRule],
    budget: BitBudget,
    blocks: Mapping[str, Sequence[str]],
    batches: Batches,
    track: Track,
) -> list[LayerRule]:
    """Rules that give each matrix product its scheme. Layers named by `rules`, tensors that are not
    factors of a matrix product, and tensors that no batch reaches keep theirs. `plan` and `blocks`:
    see `quantize_blocks_`; planned without the budget."""
    paths = {name: tensor.paths for name, tensor in find_tensors(model).items()}
    shapes = {name: tuple(tensor_out_in(model, name).shape) for name in plan}
    groups = dict[tuple[str, ...], list[_Choice]]()
    with BlockRunner(model, blocks, batches) as runner:
        for path in track(runner, "measuring layers", len(blocks)):
            names = [
                name
                for name in blocks[path]
                if not any(fnmatchcase(p, rule.match) for p in paths[name] for rule in rules)
            ]
            moments = {n: seen.moment for n, seen in observe(model, path, names, runner).items()}
            factors = {}
            for name, moment in moments.items():
                # Without an output's moment, the layer is the whole block.
                if moment.output is not None:
                    h = moment.input.diagonal()
                    if plan[name].solver == "gptq":
                        h = input_importance(moment.input, plan[name].settings)
                    factors[name] = moment.output.diagonal(), h, moment.input
            # Layers that read the same tensor get one scheme, because runtimes fuse them.
            for group in _readers(model, list(factors), runner):
                choices = [
                    _choice(model, {n: replace(plan[n], scheme=s) for n in group}, factors)
                    for s in budget.schemes
                    if not isinstance(s.granularity, Blocks)
                    or not any(shapes[name][-1] % s.granularity.size for name in group)
                ]
                groups |= {tuple(group): choices} if choices else {}
    fixed = plan.keys() - {name for group in groups for name in group}
    rest = sum(_bytes(plan[name], shapes[name]) for name in fixed)
    weights = sum(map(math.prod, shapes.values()))
    sizes = [[choice.size for choice in choices] for choices in groups.values()]
    least, most = rest + sum(map(min, sizes)), rest + sum(map(max, sizes))
    room = int((budget.bytes or 0) if budget.bits is None else budget.bits * weights / 8)
    if not least <= room <= most:
        raise GridError(
            f"a budget of {8 * room / weights:.3g} bits per weight ({size(room)}) is not possible: "
            f"the schemes that layers and targets allow take {8 * least / weights:.3g} to "
            f"{8 * most / weights:.3g} ({size(least)} to {size(most)}), scales and offsets included"
        )
    chosen = {
        canonical_name(name).removesuffix(".weight"): choice.scheme
        for group, choice in zip(groups, _knapsack(list(groups.values()), room - rest), strict=True)
        for name in group
    }
    return _rules(chosen, [path for of_tensor in paths.values() for path in of_tensor])


def _readers(model: nn.Module, names: Sequence[str], runner: BlockRunner) -> list[list[str]]:
    """The layers in `names`, grouped by the tensor that they read when a batch first calls them."""
    # Keeps the tensors alive, so that an id is not used twice.
    read = dict[str, Any]()

    def record(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        read.setdefault(name, args[0] if args else next(iter(kwargs.values())))

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            module = model.get_submodule(name.removesuffix(".weight"))
            hook = module.register_forward_pre_hook(partial(record, name), with_kwargs=True)
            stack.callback(hook.remove)
        for _ in runner.repeat():
            # Experts may need more than one batch.
            if len(read) == len(names):
                break
    groups = dict[int, list[str]]()
    for name, x in read.items():
        groups.setdefault(id(x), []).append(name)
    return list(groups.values())


def _choice(
    model: nn.Module,
    todo: Mapping[str, Assignment],
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor]],
) -> _Choice:
    total, cost = 0, 0.0
    for name, asked in todo.items():
        weight, (g, h, moment) = tensor_out_in(model, name).detach().float(), factors[name]
        # Rounded to nearest: the denominators in h predict the error after compensation, so no
        # candidate has to be solved by gptq.
        if asked.solver == "gptq":
            rounded = search_scale(weight, asked.scheme, h, coarse=True).fake_quantize(weight)
        else:
            solve = SOLVERS[asked.solver].solve
            rounded = solve(weight, asked.scheme, moment, asked.settings)[0].dequantize()
        cost += 0.5 * float(g @ (weight - rounded).square() @ h)
        total += _bytes(asked, tuple(weight.shape))
    return _Choice(next(iter(todo.values())).scheme, total, cost)


def _bytes(todo: Assignment, shape: tuple[int, ...]) -> int:
    tensor = PackedTensor.empty(todo.scheme, shape)
    # Scales are stored as float32 unless the solver rounds them to float16.
    is_half = todo.scheme.granularity.is_free and todo.solver in ROUNDING_SOLVERS
    return tensor.nbytes + (0 if is_half else tensor.parts.scale.nbytes)


def _knapsack(groups: Sequence[Sequence[_Choice]], room: int) -> list[_Choice]:
    """A choice of each group, with the least sum of costs and a sum of sizes of at most `room`."""
    smallest = [min(choice.size for choice in group) for group in groups]
    room -= sum(smallest)
    # Bytes above the group's smallest choice are rounded up, so the budget holds.
    unit = max(1, room // _UNITS)
    units = [
        [-(-(choice.size - low) // unit) for choice in group]
        for group, low in zip(groups, smallest, strict=True)
    ]
    least, best = torch.zeros(room // unit + 1, dtype=torch.float64), list[Tensor]()
    for group, extra in zip(groups, units, strict=True):
        options = least.new_full((len(group), len(least)), math.inf)
        for option, choice, taken in zip(options, group, extra, strict=True):
            if taken < len(least):
                option[taken:] = least[: len(least) - taken] + choice.cost
        least, index = options.min(0)
        best.append(index.to(torch.uint8))
    chosen, left = list[_Choice](), len(least) - 1
    for index, group, extra in zip(best[::-1], groups[::-1], units[::-1], strict=True):
        number = int(index[left])
        chosen.append(group[number])
        left -= extra[number]
    return chosen[::-1]


def _rules(chosen: Mapping[str, Scheme], everything: Sequence[str]) -> list[LayerRule]:
    """Rules that give the layers at these paths their schemes: one rule for the same layer in all
    blocks with its most frequent scheme, after rules for the exceptions."""
    exceptions, general = list[LayerRule](), list[LayerRule]()
    for kind, paths in by_glob(chosen).items():
        usual = Counter(chosen[path] for path in paths).most_common(1)[0][0]
        if {path for path in everything if fnmatchcase(path, kind)} == set(paths):
            general.append(LayerRule(kind, usual))
            paths = [path for path in paths if chosen[path] != usual]
        exceptions += [LayerRule(path, chosen[path]) for path in paths]
    return exceptions + general
