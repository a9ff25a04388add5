"""Freeze a model's weights to integers, in place.

    quantize_(model, "w4-block32")
        each layer on its own (rtn, search, sqnr)
    quantize_(model, "w4-block32", "gptq", calibration=token_ids)
        block by block, on the inputs that the quantized blocks before give

`layer_rules.py` says which layers, on which grid, by which solver. Works before or after PEFT has
wrapped the layers: only the innermost base layer is replaced.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError
from qwlora.formats.base_files import save_as_base_
from qwlora.formats.model_source import forget_gguf_
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme, parse_scheme
from qwlora.grid.second_moments import Moments
from qwlora.messages import lines
from qwlora.nn import (
    has_computed_weight,
    instance_forward_problem,
    is_packable,
    pack_at_,
    packed_weights,
    tie_weights_,
)
from qwlora.nn.fingerprint import remember_floats_
from qwlora.nn.finite import check_base_finite
from qwlora.nn.frozen import assert_frozen
from qwlora.nn.meta_tensors import refuse_meta
from qwlora.nn.unwrap import unwrapped
from qwlora.parameter_names import canonical_name, is_adapter_name
from qwlora.progress import Track, untracked
from qwlora.quantize.layer_rules import Assignment, Candidate, Rule, assign
from qwlora.quantize.quantize_blocks import batches_of, quantize_blocks_
from qwlora.quantize.quantize_tensor import (
    LayerReport,
    solve_tensor,
    tensor_out_in,
    warn_of_second_rounding,
)
from qwlora.quantize.solvers import SOLVERS, solver_named


@dataclass(frozen=True)
class BaseSize:
    """Size of the packed layers (codes, scales and offsets), and the number of weights that stay
    float.
    """

    bytes: int
    weights: int
    float_weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True, repr=False)
class QuantizeReport:
    """The size of the base, and how each tensor was quantized by its canonical name."""

    size: BaseSize
    layers: dict[str, LayerReport] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = Counter(f"{layer.scheme} by {layer.solver}" for layer in self.layers.values())
        grids = ", ".join(f"{count} {how}" for how, count in counts.most_common(3))
        more = f" and {len(counts) - 3} other grids" if len(counts) > 3 else ""
        return (
            f"QuantizeReport of {len(self.layers)} tensors ({grids}{more}): "
            f"{self.size.bits_per_weight:.2f} bits per weight, {self.size.bytes / 1e6:.1f} MB, and "
            f"{self.size.float_weights:,} float weights"
        )


def quantize_(
    model: nn.Module,
    scheme: Scheme | str,
    solver: str = "search",
    *,
    rules: Sequence[Rule] = (),
    calibration: Tensor | Iterable[Any] | None = None,
    moments: Moments | None = None,
    work: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    track: Track = untracked,
) -> QuantizeReport:
    """Quantize the layers of `model` in place.

    Args:
        scheme: the grid of every weight, or its short name (`w4-block32`, see `parse_scheme`).
        solver: `rtn`, `search`, `sqnr` or `gptq` (see `solvers.py`).
        rules: exceptions for some layers (see `layer_rules.py`).
        calibration: token ids [sequences, tokens], or batches as a DataLoader gives them (dicts,
            tensors, tuples); needed by gptq, and for `moments`.
        moments: filled with the second moments of each layer (`second_moments.py`), which
            `initialize_adapter_` needs for `qera`.
        work: a folder for finished blocks; the same call resumes after the last one in it.
        settings: of solvers, by name: `{"gptq": GptqSettings(sweeps=0)}`.

    Raises:
        GridError: a scheme does not fit its layer (all such layers are named), a rule matches
            nothing, or there is nothing to quantize.
        CalibrationError: a tensor of the model or an input holds nan or infinity, a layer saw no
            data, or a block cannot be differentiated.
    """
    model = model_to_pack(model)
    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    plan = plan_layers(model, scheme, solver, rules, settings)
    check_base_finite(model)
    if moments is not None or any(SOLVERS[todo.solver].needs_calibration for todo in plan.values()):
        reports = quantize_blocks_(
            model, plan, batches_of(calibration, model), moments, work, track
        )
    else:
        reports = {}
        for name in track(list(plan), "quantizing", len(plan)):
            quantized, reports[canonical_name(name)] = solve_tensor(
                name, tensor_out_in(model, name), plan[name]
            )
            pack_at_(model, name, quantized)
    finish_packing_(model)
    warn_of_second_rounding(reports)
    return QuantizeReport(base_size(model), reports)


def model_to_pack(model: nn.Module) -> nn.Module:
    """The model itself, without wrappers, whose weights can be replaced by packed layers.

    Raises:
        GridError: it is wrapped in DistributedDataParallel, or has weights without data.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise GridError(
            "the model is wrapped in DistributedDataParallel, which keeps track of the float "
            "weights that would be replaced; quantize first, then wrap"
        )
    model = unwrapped(model)
    refuse_meta(model, GridError)
    return model


def finish_packing_(model: nn.Module) -> None:
    """Make a base of a model whose weights were packed: tie heads, let it save itself as a base,
    check that it computes its codes, and remember its float tensors.

    Raises:
        GridError: a packed layer does not compute its codes; see `assert_frozen`.
    """
    if isinstance(model, PreTrainedModel):
        tie_weights_(model)
        if getattr(model, "quantization_method", None) == "gguf":
            forget_gguf_(model)
        save_as_base_(model)
    assert_frozen(model)
    remember_floats_(model)


def plan_layers(
    model: nn.Module,
    scheme: Scheme,
    solver: str,
    rules: Sequence[Rule] = (),
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Assignment]:
    """Scheme and solver of each tensor that `quantize_` would replace, by its name in the model.
    Raises what `quantize_` would raise.
    """
    for named in {solver, *(rule.solver for rule in rules if rule.solver), *(settings or ())}:
        solver_named(named)
    plan, misfits = {}, []
    assigned = assign(find_tensors(model), scheme, solver, rules)
    _refuse_unpackable(model, assigned)
    for name, todo in assigned.items():
        shape = tuple(tensor_out_in(model, name).shape)
        granularity = todo.scheme.granularity
        if len(shape) == 3 and isinstance(
            granularity, PerChannel
        ):  # a channel of a bank of experts is a row of one of them
            todo = replace(todo, scheme=replace(todo.scheme, granularity=PerBlock(shape[-1])))
        try:
            todo.scheme.scale_shape(shape)
        except GridError as error:
            misfits.append(f"{canonical_name(name)}: {todo.scheme} does not fit: {error}")
        plan[name] = replace(todo, settings=(settings or {}).get(todo.solver))
    if misfits:
        shown = "\n  ".join(lines(misfits))
        raise GridError(
            f"{len(misfits)} of {len(plan)} layers do not fit their scheme; choose a block size "
            f"that divides their input\n  {shown}"
        )
    if not plan:
        raise GridError("the model has no layer left to quantize")
    return plan


def _refuse_unpackable(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse layers that a packed layer cannot replace; all are named."""
    problems = []
    for name in names:
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        if key != "weight":  # a 3-D parameter is packed in place
            continue
        if has_computed_weight(module):
            problem = (
                "computes its weight in each forward (weight_norm or another parametrization, or "
                "pruning). Make the result permanent first: torch.nn.utils.parametrize."
                "remove_parametrizations(layer, 'weight'), remove_weight_norm or prune.remove"
            )
        else:
            problem = instance_forward_problem(module) or ""
        if problem:
            problems.append(f"{canonical_name(path)} {problem}")
    if problems:
        raise GridError(
            "\n  ".join(
                [
                    f"{len(problems)} layers cannot be quantized as they are; change them, or "
                    "keep them float by a rule",
                    *lines(problems),
                ]
            )
        )


def find_tensors(model: nn.Module) -> dict[str, Candidate]:
    """The tensors that can be packed, by name in the model; tied ones under the first name."""
    readers: dict[int, list[str]] = {}
    computed = {}
    for path, module in model.named_modules():
        if is_adapter_name(path) or isinstance(module, ParametrizationList):
            continue
        if has_computed_weight(module):
            computed[path] = module
            continue
        for key, parameter in module._parameters.items():
            if parameter is not None and not is_adapter_name(f"{path}.{key}"):
                readers.setdefault(id(parameter), []).append(f"{path}.{key}" if path else key)
    heads = _heads(model)
    found = {}
    for names in readers.values():
        path, _, key = names[0].rpartition(".")
        module = model.get_submodule(path)
        product = isinstance(module, nn.Linear | Conv1D)
        if key == "weight" and is_packable(module):
            by_default = product and len(names) == 1 and module not in heads
        elif is_expert_stack(module, key):
            by_default, product = True, False
        else:
            continue
        paths = tuple(canonical_name(name).removesuffix(".weight") for name in names)
        found[names[0]] = Candidate(paths, by_default, product and len(names) == 1)
    for path, module in computed.items():
        product = isinstance(module, nn.Linear | Conv1D)
        by_default = product and module not in heads
        found[f"{path}.weight"] = Candidate((canonical_name(path),), by_default, product)
    return found


def _heads(model: nn.Module) -> set[nn.Module]:
    """The modules that compute the result from the last hidden state: the output head, and anything
    else outside a transformers model's body (a classifier, a projection)."""
    heads: set[nn.Module] = set()
    for inner in _transformers_models(model):
        output = inner.get_output_embeddings()
        body = set(inner.base_model.modules())
        heads.add(getattr(output, "base_layer", output))
        heads.update(module for module in inner.modules() if module not in body)
    return heads


def _transformers_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost transformers models in `model`: itself, or what a wrapper holds."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _transformers_models(child)


def is_expert_stack(module: nn.Module, key: str) -> bool:
    """Whether the parameter is a stack of matrices, one per expert."""
    parameter = module._parameters.get(key)
    return (
        parameter is not None
        and parameter.ndim == 3
        and parameter.is_floating_point()
        and min(parameter.shape) > 1
    )


def base_size(model: nn.Module) -> BaseSize:
    """Bytes and count of all packed weights in `model`."""
    own = [layer for layer in packed_weights(model).values() if not layer.is_tied]
    floats = sum(p.numel() for name, p in model.named_parameters() if not is_adapter_name(name))
    return BaseSize(
        sum(layer.own_bytes for layer in own),
        sum(math.prod(layer.tensor.shape) for layer in own),
        floats,
    )
