"""Convert an encodings file to another version, without losing or inventing anything.

    what                                  0.6.1     1.0.0     2.0.0     2.1.0
    activations and parameters separate    yes       yes       no        no
    excluded layers, quantizer_args        yes       yes       no        no
    `symmetric` is a field                 yes       yes       no        no
    signed or unsigned codes               no        no        yes       yes
    axis, nested scales                    no        no        yes       yes
    per block                              no        yes       yes       yes
    per channel with one channel           no        yes       yes       yes
    LPBQ                                   no        yes       yes       yes
    LPBQ's decompressed bitwidth            -        yes       no        no
    LPBQ's channel scale                    -        flat      any       one axis
    float16 without a scale                yes       yes       no        no
    float8, float4 with scales             no        no        yes       yes

In 2.x, symmetric means that every offset is at the center. From 0.6.1 or 1.0.0 to 2.x, symmetric
codes become signed; the grid is the same.

Flat lists of block scales (1.0.0) have two orders if the block axis precedes the channel axis (the
[in, out] weight of a MatMul): as the tensor is stored, or by channel. Only our own files imply the
order, by their producer (`block_order`, "tensor" if absent); for others the caller gives it.

A field is *lost* if converting back gives another value; that is how losses are found. What a
target needs and the source does not have (an axis, which names are parameters, the decompressed
bitwidth) is *lacking*: it comes from the model's graph or from the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from qwlora.encodings.compare import encoding_differences
from qwlora.encodings.json_fields import printable
from qwlora.encodings.model import (
    BLOCK_ORDERS,
    VERSIONS,
    BlockOrder,
    Encoding,
    EncodingsFile,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
)
from qwlora.encodings.onnx_tensors import Graph, OnnxTensor
from qwlora.encodings.version_2 import channel_axis_of, channel_shape
from qwlora.errors import ConversionError

_OUR_PACKAGE = "qwlora"
_UNKNOWN = OnnxTensor(parameter=False)


@dataclass(frozen=True)
class _Target:
    """A version, and what is known apart from the file."""

    version: str
    graph: Graph
    decompressed_bitwidth: int | None
    block_order: BlockOrder | None  # of flat block scales, in this version

    @property
    def has_sections(self) -> bool:
        """Activations and parameters are separate; there is no axis."""
        return self.version < "2"


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
    if version not in VERSIONS:
        raise ConversionError(
            f"encodings version {printable(version)!r} is not one of {', '.join(VERSIONS)}", (), ()
        )
    if block_order is None and (file.producer or {}).get("package") == _OUR_PACKAGE:
        stated: Any = (file.producer or {}).get("block_order", "tensor")
        block_order = stated
    if block_order not in (None, *BLOCK_ORDERS):
        raise ConversionError(
            f"block order {printable(str(block_order))!r} is not one of {', '.join(BLOCK_ORDERS)}",
            (),
            (),
        )
    target = _Target(version, graph or {}, decompressed_bitwidth, block_order)
    source = _Target(file.version, graph or {}, decompressed_bitwidth, block_order)
    lost: list[str] = []
    lacking: list[str] = []
    kept: list[Encoding] = []
    for original in file.encodings:
        encoding = _with_positive_axis(original, target.graph)
        projected, needs = _project(encoding, target)
        lacking += [f"{printable(encoding.name)}: {need}" for need in needs]
        if projected is None:
            lost.append(f"{printable(encoding.name)}: the whole encoding, {_described(encoding)}")
            continue
        kept.append(projected)
        if not needs:
            lost += _lost_fields(encoding, *_project(projected, source))
    parameters, lost_sections = _project_parameters(file, {e.name for e in kept}, target, lacking)
    lost += lost_sections
    if not target.has_sections:
        fields = {"excluded_layers": file.excluded_layers, "quantizer_args": file.quantizer_args}
        lost += [f"file: {name}" for name, value in fields.items() if value is not None]
    if lacking or (lost and not lossy):
        raise ConversionError(f"encodings {file.version} -> {version}", lost, lacking)
    return EncodingsFile(
        version,
        tuple(kept),
        parameters,
        file.excluded_layers if target.has_sections else None,
        file.quantizer_args if target.has_sections else None,
        file.producer,
    )


def _lost_fields(encoding: Encoding, restored: Encoding | None, needs: list[str]) -> Iterable[str]:
    """What differs in `restored`, the encoding after a round trip; and what would prevent that."""
    if restored is None:
        return [f"{printable(encoding.name)}: {_described(encoding)}"]
    differences = encoding_differences(encoding, restored, unknown_differs=True)
    lost = [
        f"{printable(encoding.name)}: {d.field} {d.first}"
        for d in differences
        if d.first != "not said"
    ]
    return [*lost[:-1], f"{lost[-1]}; to come back needs {needs[0]}"] if lost and needs else lost


def _described(encoding: Encoding) -> str:
    match encoding:
        case IntegerEncoding():
            return f"integers of {encoding.bitwidth} bits"
        case LpbqEncoding():
            return f"LPBQ of {encoding.bitwidth} bits"
        case FloatEncoding():
            name = f" ({encoding.format})" if encoding.format else ""
            return f"floats of {encoding.bitwidth} bits{name}"


def _project_parameters(
    file: EncodingsFile, names: set[str], target: _Target, lacking: list[str]
) -> tuple[frozenset[str] | None, list[str]]:
    """The parameters among `names` in the target, and what is lost of them."""
    graph, known = target.graph, file.parameters
    if target.has_sections and known is not None:
        return known & names, []
    if target.has_sections:
        lacking += [
            f"{printable(name)}: whether it is a parameter; give the model's graph (--onnx)"
            for name in sorted(names - graph.keys())
        ]
        return frozenset(name for name in names & graph.keys() if graph[name].parameter), []
    if known is None:
        return None, []
    lost = sorted(n for n in names if n not in graph or graph[n].parameter != (n in known))
    if not lost:
        return None, []
    return None, [
        f"file: which of {len(lost)} encodings are parameters and which activations "
        f"({printable(', '.join(lost))})"
    ]


def _with_positive_axis(encoding: Encoding, graph: Graph) -> Encoding:
    shape = graph.get(encoding.name, _UNKNOWN).shape
    if isinstance(encoding, LpbqEncoding) or encoding.axis is None or encoding.axis >= 0:
        return encoding
    if shape is None or -encoding.axis > len(shape):
        return encoding
    return encoding.replace(axis=encoding.axis % len(shape))


def _project(encoding: Encoding, target: _Target) -> tuple[Encoding | None, list[str]]:
    """What the target can express of an encoding, None if nothing; and what it lacks."""
    match encoding:
        case IntegerEncoding():
            return _project_integer(encoding, target)
        case LpbqEncoding():
            return _project_lpbq(encoding, target)
        case FloatEncoding():
            has_no_format = encoding.scale is None and encoding.format is None
            has_both = encoding.scale is not None and encoding.format is not None
            return (encoding if (has_no_format if target.has_sections else has_both) else None), []


def _project_integer(encoding: IntegerEncoding, target: _Target) -> tuple[Encoding, list[str]]:
    tensor = target.graph.get(encoding.name, _UNKNOWN)
    if target.has_sections:
        if axes := _exchanged_axes(encoding, tensor.channel_axis, target.block_order):
            encoding = encoding.replace(
                scale=encoding.scale.swapaxes(*axes), offset=encoding.offset.swapaxes(*axes)
            )
        one = encoding.granularity == "tensor" or (
            target.version == "0.6.1" and encoding.scale.size == 1
        )
        shape: tuple[int, ...] = () if one else (encoding.scale.size,)
        block_size = None if target.version == "0.6.1" else encoding.block_size
        scale, offset = encoding.scale.reshape(shape), encoding.offset.reshape(shape)
        return encoding.replace(
            scale=scale, offset=offset, signed=None, axis=None, block_size=block_size
        ), []
    centered = bool((encoding.offset == encoding.center).all())
    signed = encoding.symmetric if encoding.signed is None else encoding.signed
    changes: dict[str, Any] = {"symmetric": centered, "signed": signed}
    needs: list[str] = []
    if encoding.axis is None and encoding.granularity != "tensor":
        layout = (
            _channel_layout(encoding, tensor)
            if encoding.block_size is None
            else _block_layout(encoding.scale.size, encoding.block_size, tensor, target)
        )
        if isinstance(layout, str):
            needs.append(layout)
        else:
            changes |= {
                "axis": layout.axis,
                "scale": layout.nested(encoding.scale),
                "offset": layout.nested(encoding.offset),
            }
    return encoding.replace(**changes), needs


def _project_lpbq(encoding: LpbqEncoding, target: _Target) -> tuple[Encoding | None, list[str]]:
    if target.version == "0.6.1":
        return None, []
    if target.version == "1.0.0":
        decompressed = encoding.decompressed_bitwidth or target.decompressed_bitwidth
        if axes := _exchanged_axes(encoding, encoding.channel_axis, target.block_order):
            encoding = encoding.replace(block_scale=encoding.block_scale.swapaxes(*axes))
        flat = {
            "block_scale": encoding.block_scale.reshape(-1),
            "channel_scale": encoding.channel_scale.reshape(-1),
        }
        needs = [] if decompressed else ["its decompressed bitwidth (--decompressed-bitwidth)"]
        return encoding.replace(
            **flat, decompressed_bitwidth=decompressed, axis=None, channel_axis=None
        ), needs
    projected = encoding.replace(decompressed_bitwidth=None)
    if encoding.axis is None:
        tensor = target.graph.get(encoding.name, _UNKNOWN)
        layout = _block_layout(encoding.block_scale.size, encoding.block_size, tensor, target)
        if isinstance(layout, str):
            return projected, [layout]
        channel, rank = tensor.channel_axis, len(layout.shape)
        if channel is None or layout.shape[channel] != encoding.channel_scale.size:
            return projected, [
                "its channel axis: its shape in the graph does not have "
                f"{encoding.channel_scale.size} channels"
            ]
        channel_scale, block_scale = (
            encoding.channel_scale.reshape(channel_shape(rank, channel)),
            layout.nested(encoding.block_scale),
        )
        projected = projected.replace(
            axis=layout.axis,
            channel_axis=channel,
            block_scale=block_scale,
            channel_scale=channel_scale,
        )
    assert projected.axis is not None
    if target.version == "2.0.0":
        return projected.replace(
            channel_axis=channel_axis_of(projected.channel_scale.shape, projected.axis)
        ), []
    along = [axis for axis, size in enumerate(projected.channel_scale.shape) if size > 1]
    channel = projected.channel_axis
    if len(along) > 1 or (
        channel is not None and projected.channel_scale.size != projected.block_scale.shape[channel]
    ):
        return None, []
    return projected, (
        [] if channel is not None else ["its channel axis, which its shapes leave open"]
    )


@dataclass(frozen=True)
class _Layout:
    """How a flat list of scales is nested.

    Args:
        axis: of the channels or blocks.
        shape: of the nested scales.
        channel_first: the channel axis, if the list is ordered by channel.
    """

    axis: int
    shape: tuple[int, ...]
    channel_first: int | None = None

    def nested(self, flat: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if self.channel_first is None:
            return flat.reshape(self.shape)
        swapped = list(self.shape)
        swapped[self.axis], swapped[self.channel_first] = (
            swapped[self.channel_first],
            swapped[self.axis],
        )
        return flat.reshape(swapped).swapaxes(self.axis, self.channel_first)


def _exchanged_axes(
    encoding: IntegerEncoding | LpbqEncoding, channel_axis: int | None, order: BlockOrder | None
) -> tuple[int, int] | None:
    """The axes of nested block scales to swap before they are listed by channel; None if they are
    in that order already, or are to be listed in the order of the tensor."""
    axis = encoding.axis
    if order != "channel" or encoding.block_size is None or axis is None or channel_axis is None:
        return None
    return (axis, channel_axis) if axis <= channel_axis else None


def _channel_layout(encoding: IntegerEncoding, tensor: OnnxTensor) -> _Layout | str:
    """How the scales are nested, or what is lacking."""
    if tensor.shape is None or tensor.channel_axis is None:
        return (
            "its channel axis; give the model's graph (--onnx), in which the op that reads the "
            "tensor implies one"
        )
    if tensor.shape[tensor.channel_axis] != encoding.scale.size:
        return (
            f"its channel axis: there are {encoding.scale.size} scales, but axis "
            f"{tensor.channel_axis} has {tensor.shape[tensor.channel_axis]} in the graph"
        )
    return _Layout(tensor.channel_axis, encoding.scale.shape)


def _block_layout(
    count: int, block_size: int, tensor: OnnxTensor, target: _Target
) -> _Layout | str:
    """How `count` block scales are nested, or what is lacking."""
    if tensor.shape is None or tensor.block_axis is None or tensor.channel_axis is None:
        return (
            "its block axis and the shape of its scales; give the model's graph (--onnx), in which "
            "the op that reads the tensor implies them"
        )
    shape = tuple(
        -(-size // block_size) if axis == tensor.block_axis else size
        for axis, size in enumerate(tensor.shape)
    )
    shape = tuple(
        size if axis in (tensor.block_axis, tensor.channel_axis) else 1
        for axis, size in enumerate(shape)
    )
    if tensor.shape[tensor.block_axis] % block_size or math.prod(shape) != count:
        return (
            f"the shape of its scales: blocks of {block_size} on a tensor of {list(tensor.shape)} "
            f"are not {count}"
        )
    if tensor.block_axis > tensor.channel_axis:
        return _Layout(tensor.block_axis, shape)
    if target.block_order is None:
        return (
            "the order of its block scales: 1.0.0 lists them as the tensor is stored in some files "
            "and by channel in others, and the two differ here; give --block-order tensor (files "
            "of AIMET's sim.onnx.export) or --block-order channel (files of its sim.export)"
        )
    return _Layout(
        tensor.block_axis, shape, tensor.channel_axis if target.block_order == "channel" else None
    )
