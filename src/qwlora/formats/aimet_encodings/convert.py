"""Convert an encodings file to another version, without losing or inventing anything; and compare
two files of any versions.

The table in docs/encodings.md says what each version holds.

In 2.x, symmetric means that every offset is at the center. From 0.6.1 or 1.0.0 to 2.x, symmetric
codes become signed; the grid is the same.

Flat lists of block scales (1.0.0) have two orders if the block axis precedes the channel axis (the
[in, out] weight of a MatMul): as the tensor is stored, or by channel. Only our own files imply the
order, by their producer (`block_order`, "tensor" if absent); for others the caller gives it.

A field is *lost* if converting back gives another value; that is how losses are found. No loss are
`excluded_layers` and `quantizer_args`, which say how the file came about and change no grid. What a
target needs and the source does not have (an axis, which names are parameters, the decompressed
bitwidth) is *lacking*: it comes from the model's graph or from the caller.

Two files are compared with a relative tolerance for scales, everything else exactly. Not
differences: fields that one version does not have (an axis, a section), the version, the producer.
A flat list of scales equals a nested one with the same numbers in the same order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qwlora.errors import ConversionError
from qwlora.formats.aimet_encodings.documents import channel_shape, printable, shared_lines
from qwlora.formats.aimet_encodings.model import (
    BLOCK_ORDERS,
    VERSIONS,
    BlockOrder,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    has_axes,
)
from qwlora.formats.aimet_encodings.onnx_tensors import Graph, OnnxTensor


@dataclass(frozen=True)
class _Target:
    """A version, and what is known apart from the file."""

    version: str
    graph: Graph
    decompressed_bitwidth: int | None
    block_order: BlockOrder | None  # of flat block scales

    def tensor(self, entry: Entry) -> OnnxTensor:
        return self.graph.get(entry.name, OnnxTensor(parameter=False))


class _Lacking(Exception):  # noqa: N818 (never leaves this module)
    """What an encoding needs and nothing says."""


def convert(
    file: EncodingsFile,
    version: str,
    lossy: bool = False,
    *,
    graph: Graph | None = None,
    decompressed_bitwidth: int | None = None,
    block_order: BlockOrder | None = None,
) -> EncodingsFile:
    """`file` in another version.

    Args:
        version: one of `VERSIONS`.
        lossy: drop what the version cannot express, including whole encodings, instead of raising.
        graph: the model's tensors (`read_graph`): their axes, and which are parameters. What the
            graph also says is not lost.
        decompressed_bitwidth: of LPBQ encodings without one (2.x).
        block_order: of flat block scales in 1.0.0, read or written. Default: what the
            producer states if we wrote the file, otherwise unknown. Needed only if the two orders
            differ.

    Raises:
        ConversionError: the version or the order is unknown; something would be lost and `lossy` is
            False; or something is lacking.
    """
    if block_order is None and (file.producer or {}).get("package") == "qwlora":
        block_order = (file.producer or {}).get("block_order", "tensor")  # type: ignore[assignment]
    for value, choices in ((version, VERSIONS), (block_order or "tensor", BLOCK_ORDERS)):
        if value not in choices:
            problem = f"{printable(str(value))!r} is not one of {', '.join(choices)}"
            raise ConversionError(problem, (), ())
    target = _Target(version, graph or {}, decompressed_bitwidth, block_order)
    source = replace(target, version=file.version)
    lost: list[tuple[str, str]] = []
    lacking: list[tuple[str, str]] = []
    kept: dict[str, Entry] = {}
    from_list = (file.version, version) == ("0.6.1", "1.0.0")  # of channels, or of blocks
    for entry in file.encodings:
        tensor, axis = target.tensor(entry), entry.axis
        if axis is not None and axis < 0 and tensor.shape and -axis <= len(tensor.shape):
            entry = entry.replace(axis=axis % len(tensor.shape))
        try:
            is_seen = from_list and tensor.channel_axis is not None
            if is_seen and isinstance(entry, IntegerEncoding) and entry.granularity == "channel":
                _channel_axis(tensor, entry.scale.size)  # refuses a list of blocks
            projected = _project(entry, target)
        except _Lacking as need:
            lacking.append((entry.name, str(need)))
            continue
        if projected is None:
            lost.append((entry.name, f"the whole encoding, {_description(entry)}"))
        else:
            kept[entry.name] = projected
            lost += [(entry.name, field) for field in _lost_fields(entry, projected, source)]
    stored = {name for name in kept if name in target.graph and target.graph[name].parameter}
    unknown = "whether it is a parameter"
    if has_axes(version) and file.parameters is not None:
        lost += [
            (name, f"{unknown} or an activation")
            for name in sorted(kept)
            if name not in target.graph or (name in file.parameters) != (name in stored)
        ]
    elif not has_axes(version) and file.parameters is None:
        lacking += [
            (name, f"{unknown}; give the model's graph (--onnx)")
            for name in sorted(kept.keys() - target.graph.keys())
        ]
    if lacking or (lost and not lossy):
        raise ConversionError(
            f"encodings {file.version} -> {version}", shared_lines(lost), shared_lines(lacking)
        )
    encodings = tuple(kept.values())
    if has_axes(version):
        return EncodingsFile(version, encodings, producer=file.producer)
    parameters = frozenset(stored if file.parameters is None else file.parameters & kept.keys())
    return file.replace(version=version, encodings=encodings, parameters=parameters)


def _lost_fields(entry: Entry, projected: Entry, source: _Target) -> list[str]:
    """The fields that differ after the way back, or what that way would need."""
    try:
        restored = _project(projected, source)
    except _Lacking as need:
        return [f"to come back needs {need}"]
    if restored is None:
        return [_description(entry)]
    differences = encoding_differences(entry, restored, unknown_differs=True)
    return [f"{d.field} {d.first}" for d in differences if d.first != "not said"]


def _description(entry: Entry) -> str:
    kind = {IntegerEncoding: "integers", LpbqEncoding: "LPBQ", FloatEncoding: "floats"}[type(entry)]
    name = f" ({entry.format})" if isinstance(entry, FloatEncoding) and entry.format else ""
    return f"{kind} of {entry.bitwidth} bits{name}"


def _project(entry: Entry, target: _Target) -> Entry | None:
    """What the target can express of an encoding, None if nothing. Raises `_Lacking`."""
    if isinstance(entry, FloatEncoding):
        return entry if has_axes(target.version) == (entry.format is not None) else None
    return (_nested if has_axes(target.version) else _flat)(entry, target)


def _flat(entry: IntegerEncoding | LpbqEncoding, target: _Target) -> Entry | None:
    """Without axes: one list of scales, blocks in the target's order."""
    is_legacy = target.version == "0.6.1"
    if isinstance(entry, IntegerEncoding):
        one = entry.granularity == "tensor" or (is_legacy and entry.scale.size == 1)
        channel, size = target.tensor(entry).channel_axis, None if is_legacy else entry.block_size
        scale, offset = (
            _in_order(values, entry, channel, target).reshape(() if one else -1)
            for values in (entry.scale, entry.offset)
        )
        return entry.replace(scale=scale, offset=offset, signed=None, axis=None, block_size=size)
    if is_legacy:
        return None
    decompressed = entry.decompressed_bitwidth or target.decompressed_bitwidth
    if not decompressed:
        raise _Lacking("its decompressed bitwidth (--decompressed-bitwidth)")
    return entry.replace(
        block_scale=_in_order(entry.block_scale, entry, entry.channel_axis, target).reshape(-1),
        channel_scale=entry.channel_scale.reshape(-1),
        decompressed_bitwidth=decompressed,
        axis=None,
    )


def _in_order(
    nested: npt.NDArray[Any],
    entry: IntegerEncoding | LpbqEncoding,
    channel: int | None,
    target: _Target,
) -> npt.NDArray[Any]:
    """Nested block scales, turned so that reading them in order gives the target's list."""
    block, has_blocks = entry.axis, entry.block_size is not None
    if not has_blocks or block is None or channel is None or channel < block:
        return nested
    return nested.swapaxes(block, channel) if target.block_order == "channel" else nested


def _nested(entry: IntegerEncoding | LpbqEncoding, target: _Target) -> Entry | None:
    """With axes, and scales in the shape of the tensor's channels or blocks."""
    if isinstance(entry, IntegerEncoding):
        signed = entry.symmetric if entry.signed is None else entry.signed
        entry = entry.replace(symmetric=entry.is_centered, signed=signed)
        if entry.axis is not None or entry.granularity == "tensor":
            return entry
        if entry.block_size is None:
            return entry.replace(axis=_channel_axis(target.tensor(entry), entry.scale.size))
        axis, scale, offset = _blocks(entry, target, entry.scale, entry.offset)
        return entry.replace(axis=axis, scale=scale, offset=offset)
    entry = entry.replace(decompressed_bitwidth=None)
    if entry.axis is None:
        channels = entry.channel_scale
        axis, blocks = _blocks(entry, target, entry.block_scale)
        channel = _channel_axis(target.tensor(entry), channels.size)
        entry = entry.replace(
            axis=axis,
            block_scale=blocks,
            channel_scale=channels.reshape(channel_shape(blocks.ndim, channel)),
        )
    channel_axis = entry.channel_axis
    if target.version == "2.1.0" and (
        channel_axis is None or entry.channel_scale.size != entry.block_scale.shape[channel_axis]
    ):
        return None
    return entry


def _channel_axis(tensor: OnnxTensor, channels: int) -> int:
    """The axis of `channels` scales. Raises `_Lacking`."""
    if tensor.shape is None or tensor.channel_axis is None:
        raise _Lacking(
            "its channel axis; give the model's graph (--onnx), in which the op that reads the "
            "tensor implies one"
        )
    if (size := tensor.shape[tensor.channel_axis]) != channels:
        raise _Lacking(
            f"its channel axis: there are {channels} scales, but axis {tensor.channel_axis} has "
            f"{size} in the graph"
        )
    return tensor.channel_axis


def _blocks(entry: Entry, target: _Target, *flat: npt.NDArray[Any]) -> Any:
    """The block axis, and flat lists in the shape of the blocks. Raises `_Lacking`."""
    tensor, count, block_size = target.tensor(entry), flat[0].size, entry.block_size or 1
    block, channel, sizes = tensor.block_axis, tensor.channel_axis, tensor.shape
    if sizes is None or block is None or channel is None:
        raise _Lacking(
            "its block axis and the shape of its scales; give the model's graph (--onnx), in which "
            "the op that reads the tensor implies them"
        )
    shape = [1] * len(sizes)
    shape[block], shape[channel] = sizes[block] // block_size, sizes[channel]
    if sizes[block] % block_size or math.prod(shape) != count:
        raise _Lacking(
            f"the shape of its scales: blocks of {block_size} on a tensor of {list(sizes)} "
            f"are not {count}"
        )
    if channel < block or target.block_order == "tensor":
        return block, *(values.reshape(shape) for values in flat)
    if target.block_order is None:
        raise _Lacking(
            "the order of its block scales: 1.0.0 lists them as the tensor is stored in some files "
            "and by channel in others, and the two differ here; give --block-order tensor (files "
            "of AIMET's sim.onnx.export) or --block-order channel (files of its sim.export)"
        )
    shape[block], shape[channel] = shape[channel], shape[block]
    return block, *(values.reshape(shape).swapaxes(block, channel) for values in flat)


@dataclass(frozen=True)
class Difference:
    """One field that differs, or a name that only one file has.

    Args:
        name: of the tensor, or "file".
        field: or "only in the first", "only in the second".
        first, second: both values.
        relative: of scales of equal number, the largest `|a - b| / max(|a|, |b|)`.
    """

    name: str
    field: str
    first: str = ""
    second: str = ""
    relative: float | None = None

    def __str__(self) -> str:
        if self.field.startswith("only in"):
            return f"{printable(self.name)}: {self.field}"
        size = "" if self.relative is None else f" (relative difference {self.relative:.3g})"
        return f"{printable(self.name)}, {self.field}: {self.first} | {self.second}{size}"


def diff(a: EncodingsFile, b: EncodingsFile, tolerance: float = 0.0) -> list[Difference]:
    """Every difference between `a` and `b`, in the order of `a`.

    Args:
        tolerance: relative, for scales.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance {tolerance} is not a number of 0 or more")
    differences: list[Difference] = []
    only_in_b = b.by_name
    for entry in a.encodings:
        if entry.name not in only_in_b:
            differences.append(Difference(entry.name, "only in the first"))
            continue
        differences += encoding_differences(entry, only_in_b.pop(entry.name), tolerance)
        if a.parameters is not None and b.parameters is not None:
            sections = ("an activation", "a parameter")
            first, second = (
                sections[entry.name in names] for names in (a.parameters, b.parameters)
            )
            if first != second:
                differences.append(Difference(entry.name, "section", first, second))
    differences += [Difference(name, "only in the second") for name in only_in_b]
    for field in ("excluded_layers", "quantizer_args"):
        values = getattr(a, field), getattr(b, field)
        if None not in values and values[0] != values[1]:
            first, second = (printable(repr(value)) for value in values)
            differences.append(Difference("file", field, first, second))
    return differences


def encoding_differences(
    a: Entry, b: Entry, tolerance: float = 0.0, unknown_differs: bool = False
) -> list[Difference]:
    """The fields in which two encodings differ.

    Args:
        unknown_differs: also report fields that only one has, and equal values in other shapes.
    """
    if type(a) is not type(b):
        first, second = (type(entry).__name__.removesuffix("Encoding") for entry in (a, b))
        return [Difference(a.name, "kind", first, second)]
    if a.granularity != b.granularity:
        return [Difference(a.name, "granularity", a.granularity, b.granularity)]
    differences = []
    for field in (f.name for f in fields(a)):
        values = getattr(a, field), getattr(b, field)
        if isinstance(values[0], np.ndarray) and isinstance(values[1], np.ndarray):
            texts = _array_difference(*values, tolerance, unknown_differs)
            differences += [Difference(a.name, field, *texts)] if texts else []
        elif values[0] != values[1] and (unknown_differs or None not in values):
            first, second = ("not said" if value is None else str(value) for value in values)
            differences.append(Difference(a.name, field, first, second))
    return differences


def _array_difference(a: Any, b: Any, tolerance: float, strict: bool) -> tuple[Any, ...] | None:
    """The first values that differ as texts, and the largest relative difference of scales."""
    if a.shape != b.shape and (strict or a.size != b.size or 1 not in (a.ndim, b.ndim)):
        return f"shape {list(a.shape)}", f"shape {list(b.shape)}"
    left, right = a.reshape(-1), b.reshape(-1)
    relative, unequal = None, left != right
    if a.dtype.kind == "f":
        distance = np.abs(left - right) / np.maximum(np.abs(left), np.abs(right))
        unequal, relative = distance > tolerance, float(distance.max())
    if not unequal.any():
        return None
    i, more = int(unequal.argmax()), int(unequal.sum()) - 1
    where = f" at {i}" if left.size > 1 else ""
    return f"{left[i]}{where}{f', and {more} more' if more else ''}", str(right[i]), relative
