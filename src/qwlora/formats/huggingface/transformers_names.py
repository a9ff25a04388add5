"""Maps stored tensor names to the model's parameters, with the conversions of transformers itself.

A checkpoint may lack the base model's prefix, use names of an older transformers, or store one
parameter in parts (the experts of a mixture, fused projections). transformers knows the conversions
by model type (`transformers.conversion_mapping`), and they are applied here:

    floats       as they are
    integers     only if a conversion stacks, joins or splits whole rows; it is then applied to
                 codes, scales and offsets separately

Each conversion first runs on tensors without data, which gives the names and shapes of its results.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, core_model_loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from qwlora.errors import SourceError, listed
from qwlora.formats.checkpoint import Origin
from qwlora.grid.encoding import Encoding, QuantizedTensor
from qwlora.grid.scheme import Blocks, PerBlock

ROW_OPERATIONS = tuple(
    getattr(core_model_loading, name)
    for name in ("Chunk", "Concatenate", "MergeModulelist", "Split")
    if hasattr(core_model_loading, name)  # transformers before 5.20 has no Split
)


def origins(
    model: PreTrainedModel,
    stored: Mapping[str, tuple[int, ...]],
    where: str,
    transforms: Sequence[WeightTransform] | None = None,
) -> tuple[dict[str, Origin], list[str]]:
    """Find the stored tensors of each parameter.

    Args:
        model: the model, on the meta device.
        stored: shapes of the stored tensors, by name.
        where: the checkpoint, for messages.
        transforms: conversions from the format's names; default: those that transformers has for
            older versions of the model.

    Returns:
        The origin of each parameter, and the stored names that belong to no parameter and that
        transformers does not ignore.

    Raises:
        SourceError: two stored tensors map to the same parameter, or a conversion does not fit the
            stored shapes.
    """
    meta = model.state_dict()
    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    # stored names and patterns by parameter (the first of a conversion that makes several)
    sources: dict[str, list[tuple[str, str | None]]] = {}
    unknown: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in meta:
            unknown.append(name)
        elif pattern is None and target in sources:
            raise SourceError(
                f"{where}: tensors {sources[target][0][0]!r} and {name!r} are both "
                f"parameter {target!r}; remove one of them from the checkpoint"
            )
        else:
            sources.setdefault(target, []).append((name, pattern))
    by_target: dict[str, Origin] = {}
    for first, parts in sources.items():
        converter = by_pattern.get(parts[0][1] or "")
        convert = partial(_converted, model, first, converter, parts)
        empty = {name: torch.empty(stored[name], device="meta") for name, _ in parts}
        try:
            converted = convert(empty)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{where}: parameter {first!r} cannot be made from "
                f"{listed(empty, 4)}: {error}; download the model again"
            ) from error
        operations = () if converter is None else tuple(converter.operations)
        for target, tensor in converted.items():
            shape = tuple(tensor.shape)
            by_target[target] = Origin(target, tuple(empty), convert, operations, shape)
    ignored = list(model._keys_to_ignore_on_load_unexpected or [])
    buffers = [name for name, _ in model.named_buffers()]
    old = ("rotary_emb.inv_freq", "position_ids")  # stored by older versions of transformers
    ignored += [rf"(^|\.){re.escape(o)}$" for o in old if any(n.endswith(o) for n in buffers)]
    return by_target, [n for n in unknown if not any(re.search(part, n) for part in ignored)]


def _converted(
    model: PreTrainedModel,
    target: str,
    converter: WeightConverter | None,
    sources: Sequence[tuple[str, str | None]],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The parameters made from stored tensors; `target` is the first."""
    if converter is None:
        return {target: tensors[sources[0][0]]}
    converter = deepcopy(converter)
    for stored, pattern in sources:
        # transformers accepts a callable, but says Tensor
        value: Any = partial(tensors.__getitem__, stored)
        converter.add_tensor(target, stored, pattern or "", value)
    converted = converter.convert(target, model=model, config=model.config)
    return {name: v[0] if isinstance(v, list) else v for name, v in converted.items()}


def convert_quantized(
    origin: Origin, parts: Mapping[str, QuantizedTensor], where: str
) -> QuantizedTensor:
    """As `Origin.convert`, for codes, scales and offsets separately.

    Raises:
        SourceError: the stored parts have different schemes, or the conversion does more than move
            rows.
    """
    if not origin.operations:
        return parts[origin.sources[0]]
    for op in origin.operations:
        if not isinstance(op, ROW_OPERATIONS) or getattr(op, "dim", 0) < 0:
            raise SourceError(
                f"{where}: parameter {origin.target!r} needs the conversion {op!r}, which "
                "is not possible on integers. Quantize the float model instead"
            )
    blocks = {name: _as_blocks(part) for name, part in parts.items()}
    schemes = {part.encoding.scheme: name for name, part in blocks.items()}
    if len(schemes) > 1:
        parts_of = "; ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
        raise SourceError(
            f"{where}: the parts of parameter {origin.target!r} have different schemes "
            f"({parts_of}), but a parameter must have one. Quantize the float model instead"
        )
    (scheme,) = schemes
    codes, scale, low_end = (
        origin.convert({name: read(part) for name, part in blocks.items()})
        for read in (
            lambda part: part.codes,
            lambda part: part.encoding.scale,
            lambda part: part.encoding.low_end,
        )
    )
    return QuantizedTensor(codes, Encoding(scheme, scale, low_end))


def _as_blocks(part: QuantizedTensor) -> QuantizedTensor:
    """The same values with at least one scale per row, so that rows can be moved."""
    encoding, shape = part.encoding, (*part.codes.shape[:-1], 1)
    if isinstance(encoding.scheme.granularity, Blocks):
        return part
    scale, end = (
        values.view(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
        for values in (encoding.scale, encoding.low_end)
    )
    scheme = replace(encoding.scheme, granularity=PerBlock(part.codes.shape[-1]))
    return QuantizedTensor(part.codes, Encoding(scheme, scale, end))
