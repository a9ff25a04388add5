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
from dataclasses import dataclass, field, replace
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
from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Blocks, PerBlock

ROW_OPERATIONS = tuple(
    getattr(core_model_loading, name)
    for name in ("Chunk", "Concatenate", "MergeModulelist", "Split")
    if hasattr(core_model_loading, name)  # transformers before 5.20 has no Split
)


@dataclass
class StoredTensors:
    """The stored tensors of one or more parameters, and the conversion between them.

    Args:
        first_target: the parameter's name; the first one if the conversion makes several.
        converter: the conversion of transformers, or None if the parameter is stored as it is.
        sources: names of the stored tensors, each with the pattern of the conversion that matched
            it.
    """

    first_target: str
    converter: WeightConverter | None = None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters made from the stored `tensors`."""
        if self.converter is None:
            return {self.first_target: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)
        for stored, pattern in self.sources:
            # transformers accepts a callable, but says Tensor
            value: Any = partial(tensors.__getitem__, stored)
            converter.add_tensor(self.first_target, stored, pattern, value)
        converted = converter.convert(self.first_target, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in converted.items()}


def origins(
    model: PreTrainedModel,
    stored: Mapping[str, tuple[int, ...]],
    where: str,
    transforms: Sequence[WeightTransform] | None = None,
) -> tuple[dict[str, StoredTensors], list[str]]:
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
    by_first: dict[str, StoredTensors] = {}
    unknown: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        prefix = model.base_model_prefix
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], prefix, meta)
        if target not in meta:
            unknown.append(name)
        elif pattern is not None:
            by_first.setdefault(target, StoredTensors(target, by_pattern[pattern]))
            by_first[target].sources.append((name, pattern))
        elif target in by_first:
            raise SourceError(
                f"{where}: tensors {by_first[target].sources[0][0]!r} and {name!r} are both "
                f"parameter {target!r}; remove one of them from the checkpoint"
            )
        else:
            by_first[target] = StoredTensors(target, None, [(name, name)])
    by_target: dict[str, StoredTensors] = {}
    for origin in by_first.values():
        sources = {name: torch.empty(stored[name], device="meta") for name, _ in origin.sources}
        try:
            by_target |= dict.fromkeys(origin.convert(model, sources), origin)
        except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise SourceError(
                f"{where}: parameter {origin.first_target!r} cannot be made from "
                f"{listed(sources, 4)}: {error}; download the model again"
            ) from error
    return by_target, [name for name in unknown if not _ignored(name, model)]


def _ignored(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers silently ignores this stored tensor, for example an old buffer."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or [])
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def convert_quantized(
    origin: StoredTensors, model: PreTrainedModel, parts: Mapping[str, QuantizedTensor], where: str
) -> dict[str, QuantizedTensor]:
    """As `StoredTensors.convert`, for codes, scales and offsets separately.

    Raises:
        SourceError: the stored parts have different schemes, or the conversion does more than move
            rows.
    """
    if origin.converter is None:
        return {origin.first_target: parts[origin.sources[0][0]]}
    for op in origin.converter.operations:
        if not isinstance(op, ROW_OPERATIONS) or getattr(op, "dim", 0) < 0:
            raise SourceError(
                f"{where}: parameter {origin.first_target!r} needs the conversion {op!r}, which "
                "is not possible on integers. Quantize the float model instead"
            )
    blocks = {name: _as_blocks(part) for name, part in parts.items()}
    schemes = {part.encoding.scheme: name for name, part in blocks.items()}
    if len(schemes) > 1:
        parts_of = "; ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
        raise SourceError(
            f"{where}: the parts of parameter {origin.first_target!r} have different schemes "
            f"({parts_of}), but a parameter must have one. Quantize the float model instead"
        )
    (scheme,) = schemes
    codes = origin.convert(model, {name: part.codes for name, part in blocks.items()})
    scales = origin.convert(model, {name: part.encoding.scale for name, part in blocks.items()})
    ends = origin.convert(model, {name: part.encoding.low_end for name, part in blocks.items()})
    return {
        name: QuantizedTensor(codes[name], Encoding(scheme, scales[name], ends[name]))
        for name in codes
    }


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
