"""Which layers are quantized, and how: rules on module paths.

A rule has a glob over canonical module paths (`*.down_proj`, `model.layers.0.*`, `lm_head`). The
first rule that matches a layer decides its scheme and solver, or that it stays float. A layer
without a rule gets the scheme and solver of the base if it is quantized by default.

By default: every Linear, Conv1D and bank of fused experts, but not the heads. A rule can name any
layer that can be packed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError, lines, suggestion
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, parse_scheme
from qwlora.nn import is_packable, tensor_out_in
from qwlora.nn.packed_layer import has_computed_weight, replacement_problem
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.quantize.solvers import SOLVERS, solver_named
from qwlora.system.parameter_names import canonical_name, is_adapter_name


@dataclass(frozen=True)
class LayerRule:
    """The scheme and solver of all layers whose path matches."""

    match: str  # a glob (`*`, `?`, `[...]`) over the whole canonical module path
    scheme: Scheme | None  # None keeps them float
    solver: str | None = None  # default: that of the base


@dataclass(frozen=True)
class Assignment:
    """Scheme and solver of one tensor, and the solver's settings; None for the defaults."""

    scheme: Scheme
    solver: str
    settings: Any = None


@dataclass(frozen=True)
class Candidate:
    """A tensor that can be packed."""

    paths: tuple[str, ...]  # paths of the layers that read it; its own if it is no layer's weight
    by_default: bool  # whether it is quantized without a rule
    has_matrix_input: bool  # whether a solver that needs calibration can solve it


def plan_layers(
    model: nn.Module,
    scheme: Scheme | str,
    solver: str,
    rules: Sequence[LayerRule] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Assignment]:
    """Scheme and solver of each tensor that is quantized, by its name in the model. The arguments
    are those of `quantize_`."""
    scheme, settings = parse_scheme(scheme) if isinstance(scheme, str) else scheme, settings or {}
    for named in {solver, *(rule.solver for rule in rules if rule.solver), *settings}:
        solver_named(named)
    candidates = find_tensors(model)
    names = [path for candidate in candidates.values() for path in candidate.paths]
    problems = [
        f"{rule.match!r} matches no layer{suggestion(rule.match, names, 3)}"
        for rule in rules
        if not any(fnmatchcase(name, rule.match) for name in names)
    ]
    plan = {}
    for name, candidate in candidates.items():
        matching = (r for r in rules if any(fnmatchcase(p, r.match) for p in candidate.paths))
        by_default = LayerRule("*", scheme if candidate.by_default else None)
        rule = next(matching, by_default)
        if rule.scheme is None:
            continue
        chosen = rule.solver or solver
        # Embeddings, kernels and fused experts have no matrix input to calibrate on.
        if SOLVERS[chosen].needs_calibration and not candidate.has_matrix_input:
            if rule.solver:
                problems.append(
                    f"{candidate.paths[0]}: solver {chosen} follows the inputs of a matrix product "
                    "and cannot solve this tensor; choose search, sqnr or rtn"
                )
            chosen = "search"
        plan[name] = Assignment(rule.scheme, chosen, settings.get(chosen))
    _refuse(problems, "of the base's rules cannot be followed:")
    unpackable = [
        f"{canonical_name(path)} {problem}"
        for path, _, key in (name.rpartition(".") for name in plan)
        if key == "weight" and (problem := replacement_problem(model.get_submodule(path)))
    ]
    _refuse(
        unpackable,
        "layers cannot be quantized as they are; change them, or keep them float by a rule",
    )
    for name, todo in plan.items():
        scheme, shape = todo.scheme, tuple(tensor_out_in(model, name).shape)
        if len(shape) == 3 and isinstance(scheme.granularity, PerChannel):
            # In a bank of experts, a channel is one row of one expert.
            scheme = replace(scheme, granularity=PerBlock(shape[-1]))
        try:
            PackedTensor.empty(scheme, shape)
        except GridError as error:
            problems.append(f"{canonical_name(name)}: {scheme} does not fit: {error}")
        plan[name] = replace(todo, scheme=scheme)
    _refuse(
        problems,
        f"of {len(plan)} layers do not fit their scheme; choose a block size that divides their "
        "input",
    )
    if not plan:
        raise GridError("the model has no layer left to quantize")
    return plan


def _refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        raise GridError("\n  ".join([f"{len(problems)} {what}", *lines(problems)]))


def find_tensors(model: nn.Module) -> dict[str, Candidate]:
    """The tensors that can be packed, by name in the model; tied ones under the first name."""
    readers: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if is_adapter_name(path) or isinstance(module, ParametrizationList):
            continue
        parameters: Mapping[str, object] = module._parameters
        # The parameters of a computed weight (weight_norm, pruning) are not weights themselves.
        if has_computed_weight(module):
            parameters = {"weight": module}
        for key, parameter in parameters.items():
            name = f"{path}.{key}" if path else key
            if parameter is not None and not is_adapter_name(name):
                readers.setdefault(id(parameter), []).append(name)
    heads = _heads(model)
    candidates = {}
    for names in readers.values():
        path, _, key = names[0].rpartition(".")
        module = model.get_submodule(path)
        paths = tuple(canonical_name(name).removesuffix(".weight") for name in names)
        if key == "weight" and (is_packable(module) or has_computed_weight(module)):
            # An output head shares its weight with the embedding in tied models and costs most at
            # few bits; a classifier is trained as a whole (PEFT's `modules_to_save`).
            is_matrix = isinstance(module, nn.Linear | Conv1D) and len(names) == 1
            candidates[names[0]] = Candidate(paths, is_matrix and module not in heads, is_matrix)
            continue
        parameter = cast(nn.Parameter, module._parameters[key])
        if parameter.ndim == 3 and parameter.is_floating_point() and min(parameter.shape) > 1:
            candidates[names[0]] = Candidate(paths, by_default=True, has_matrix_input=False)
    return candidates


def _heads(model: nn.Module) -> set[nn.Module]:
    """The output head, and anything else outside a transformers model's body (a classifier)."""
    if not isinstance(model, PreTrainedModel):  # a wrapper may hold some
        return set[nn.Module]().union(*map(_heads, model.children()))
    output, body = model.get_output_embeddings(), set(model.base_model.modules())
    others = (module for module in model.modules() if module not in body)
    return {getattr(output, "base_layer", output), *others}
