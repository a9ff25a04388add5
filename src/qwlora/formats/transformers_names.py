"""From the names that a file uses to the names of the model's parameters, as transformers itself converts them.

A checkpoint's names may lack the base model's prefix, be of an older version, or belong to parts of what is now one parameter (the experts of a mixture,
fused projections). transformers knows these by model type (`transformers.conversion_mapping`), and its own operations are run here: on floats as they are, and
on quantized tensors where an operation only stacks, joins or cuts whole rows, so that codes, scales and offsets move alike. The operations are first run on
tensors without data, which tells the names and shapes that come out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from qwlora.errors import SourceError
from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Lpbq, PerBlock, Scheme

ROW_OPERATIONS = (Chunk, Concatenate, MergeModulelist, Split)


@dataclass
class Origin:
    """What makes a parameter: stored tensors, each under the pattern that matched it, and the conversion (None: the one tensor as it is)."""

    first_target: str
    converter: WeightConverter | None = None
    sources: list[tuple[str, str]] = field(default_factory=list)

    def convert(self, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters from stored tensors."""
        if self.converter is None:
            return {self.first_target: tensors[self.sources[0][0]]}
        converter = deepcopy(self.converter)
        for stored, pattern in self.sources:
            converter.add_tensor(self.first_target, stored, pattern, _given(tensors[stored]))  # type: ignore[arg-type]
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {
            name: value[0] if isinstance(value, list) else value for name, value in made.items()
        }


def _given(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def origins(
    model: PreTrainedModel,
    stored: Mapping[str, tuple[int, ...]],
    where: str,
    transforms: Sequence[WeightTransform] | None = None,
) -> tuple[dict[str, Origin], list[str]]:
    """What makes each parameter of `model` (on the meta device), and the stored names that no parameter has and that transformers does not expect either.

    Args:
        model: on the meta device.
        stored: shapes of the stored tensors, under their names.
        where: the checkpoint, for messages.
        transforms: from a format's names; without, those that transformers has for the model's own older names.

    Raises:
        SourceError: two stored tensors are the same parameter, or a conversion does not fit the stored shapes.
    """
    meta = model.state_dict()
    transforms = get_model_conversion_mapping(model) if transforms is None else transforms
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    found: dict[str, Origin] = {}
    unknown: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, meta
        )
        if target not in meta and name in meta:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, meta)
        if target not in meta:
            unknown.append(name)
        elif pattern is not None:
            found.setdefault(target, Origin(target, by_pattern[pattern])).sources.append(
                (name, pattern)
            )
        elif target in found:
            raise SourceError(
                f"{where}: tensors {found[target].sources[0][0]!r} and {name!r} are both parameter {target!r}"
            )
        else:
            found[target] = Origin(target, None, [(name, name)])
    expected = {
        target: origin
        for first in found.values()
        for target, origin in _targets(first, model, stored, where)
    }
    return expected, [name for name in unknown if not _ignored(name, model)]


def _targets(
    origin: Origin, model: PreTrainedModel, stored: Mapping[str, tuple[int, ...]], where: str
) -> list[tuple[str, Origin]]:
    if origin.converter is None:
        return [(origin.first_target, origin)]
    try:
        made = origin.convert(
            model, {name: torch.empty(stored[name], device="meta") for name, _ in origin.sources}
        )
    except (ValueError, RuntimeError, KeyError, IndexError, TypeError, AttributeError) as error:
        sources = ", ".join(name for name, _ in origin.sources[:4])
        raise SourceError(
            f"{where}: parameter {origin.first_target!r} cannot be made of {sources}: {error}"
        ) from error
    return [(name, origin) for name in made]


def _ignored(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers drops this name without a word, as it does old buffers."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or [])
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return any(re.search(pattern, name) for pattern in patterns)


def convert_quantized(
    origin: Origin, model: PreTrainedModel, parts: Mapping[str, QuantizedTensor], where: str
) -> dict[str, QuantizedTensor]:
    """Parameters from stored quantized tensors: codes, scales and offsets go through the same row operations.

    Raises:
        SourceError: the parts have different grids, or the conversion does more than move rows.
    """
    if origin.converter is None:
        return {origin.first_target: parts[origin.sources[0][0]]}
    other = [
        op
        for op in origin.converter.operations
        if not isinstance(op, ROW_OPERATIONS) or getattr(op, "dim", 0) < 0
    ]
    if other:
        raise SourceError(
            f"{where}: parameter {origin.first_target!r} is made by {other[0]!r}, which is not done on integers; quantize the float model instead"
        )
    blocks = {name: _as_blocks(part) for name, part in parts.items()}
    schemes = {part.encoding.scheme: name for name, part in blocks.items()}
    if len(schemes) > 1:
        listed = "; ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
        raise SourceError(
            f"{where}: the parts of parameter {origin.first_target!r} have different grids ({listed}), and one tensor has one grid"
        )
    (scheme,) = schemes
    codes, scales, offsets = (
        origin.convert(model, {name: pick(part) for name, part in blocks.items()})
        for pick in _PICKS
    )
    return {
        name: QuantizedTensor(codes[name], Encoding(scheme, scales[name], offsets[name]))
        for name in codes
    }


def _codes(part: QuantizedTensor) -> Tensor:
    return part.codes


def _scale(part: QuantizedTensor) -> Tensor:
    return part.encoding.scale


def _offset(part: QuantizedTensor) -> Tensor:
    return part.encoding.offset


_PICKS: Sequence[Callable[[QuantizedTensor], Tensor]] = (_codes, _scale, _offset)


def _as_blocks(part: QuantizedTensor) -> QuantizedTensor:
    """The same grid with a scale for every row at least, so that rows can be moved."""
    encoding = part.encoding
    assert isinstance(encoding, Encoding), "Hugging Face formats have integer offsets"
    granularity = encoding.scheme.granularity
    if isinstance(granularity, PerBlock | Lpbq):
        return part
    shape = (*part.codes.shape[:-1], 1)
    widened: list[Any] = [
        t.view(-1, *[1] * (part.codes.ndim - 1)).expand(shape).contiguous()
        for t in (encoding.scale, encoding.offset)
    ]
    scheme = Scheme(
        encoding.scheme.bitwidth, encoding.scheme.symmetric, PerBlock(part.codes.shape[-1])
    )
    return QuantizedTensor(part.codes, Encoding(scheme, *widened))
