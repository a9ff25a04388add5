"""Maps stored tensor names to the model's parameters, with the conversions of transformers itself.

A checkpoint may lack the base model's prefix, use names of an older transformers, or store one
parameter in parts (the experts of a mixture, fused projections). transformers knows the conversions
by model type (`transformers.conversion_mapping`), and they are applied here:

    floats       as they are
    integers     only if a conversion stacks, joins or splits whole rows; it is then applied to
    codes,
                 scales and offsets separately

Each conversion first runs on tensors without data, which gives the names and shapes of its results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
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

from qwlora.errors import SourceError
from qwlora.grid.encoding import Encoding
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Lpbq, PerBlock, Scheme

ROW_OPERATIONS = tuple(
    getattr(core_model_loading, name)
    for name in ("Chunk", "Concatenate", "MergeModulelist", "Split")
    if hasattr(core_model_loading, name)  # transformers before 5.20 has no Split
)


@dataclass
class Origin:
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
            value: Any = _given(tensors[stored])  # transformers accepts a callable, but says Tensor
            converter.add_tensor(self.first_target, stored, pattern, value)
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
                f"{where}: tensors {found[target].sources[0][0]!r} and {name!r} are both parameter "
                f"{target!r}; remove one of them from the checkpoint"
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
            f"{where}: parameter {origin.first_target!r} cannot be made from {sources}: {error}; "
            "download the model again"
        ) from error
    return [(name, origin) for name in made]


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
    origin: Origin, model: PreTrainedModel, parts: Mapping[str, QuantizedTensor], where: str
) -> dict[str, QuantizedTensor]:
    """As `Origin.convert`, for quantized tensors: converts codes, scales and offsets separately.

    Raises:
        SourceError: the stored parts have different schemes, or the conversion does more than move
            rows.
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
            f"{where}: parameter {origin.first_target!r} needs the conversion {other[0]!r}, which "
            "is not possible on integers. Quantize the float model instead"
        )
    blocks = {name: _as_blocks(part) for name, part in parts.items()}
    schemes = {part.encoding.scheme: name for name, part in blocks.items()}
    if len(schemes) > 1:
        listed = "; ".join(f"{name}: {scheme}" for scheme, name in schemes.items())
        raise SourceError(
            f"{where}: the parts of parameter {origin.first_target!r} have different schemes "
            f"({listed}), but a parameter must have one. Quantize the float model instead"
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
    """The same values with at least one scale per row, so that rows can be moved."""
    encoding = part.encoding
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
