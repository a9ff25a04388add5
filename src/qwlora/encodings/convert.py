"""An encodings file in another version, without losing or inventing anything.

    what                               0.6.1     1.0.0      2.0.0      2.1.0
    activations apart from parameters   yes       yes        no         no
    excluded layers, quantizer_args     yes       yes        no         no
    `symmetric` as a field of its own   yes       yes        no         no       2.x: symmetric means every offset at the centre
    signed or unsigned codes            no        no         yes        yes      0.6.1, 1.0.0 to 2.x: signed where symmetric, the grid is the same
    axis, nested scales                 no        no         yes        yes
    per block                           no        yes        yes        yes
    per channel with one channel        no        yes        yes        yes
    LPBQ                                no        yes        yes        yes
    LPBQ's decompressed bitwidth         -        yes        no         no
    LPBQ's channel scale                 -        flat      any shape   one axis
    float16 without a scale             yes       yes        no         no
    float8, float4 with scales          no        no         yes        yes

Flat lists of block scales (1.0.0) come in two orders where the blocks' axis lies before the channels' (the [in, out] weight of a MatMul): as the tensor
lies, or by channel. The file does not say which, unless its producer is ours ("as the tensor lies"); so the caller says it.

A field is *lost* when converting back gives another value: that is the definition, and the code. What a target needs and the source does not say (an axis,
which names are parameters, the decompressed bitwidth) is *lacking*: it comes from the model's graph or from the caller, or there is no conversion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import numpy.typing as npt

from qwlora.encodings.compare import encoding_differences
from qwlora.encodings.json_fields import shown
from qwlora.encodings.list_versions import channel_axis_of, channel_shape
from qwlora.encodings.model import (
    VERSIONS,
    Encoding,
    EncodingsFile,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
)
from qwlora.encodings.onnx_parameters import Graph, TensorFacts
from qwlora.errors import ConversionError

BlockOrder = Literal["tensor", "channel"]
BLOCK_ORDERS: tuple[BlockOrder, ...] = get_args(BlockOrder)
T = TypeVar("T", IntegerEncoding, LpbqEncoding)
_OUR_PACKAGE = "qwlora"
_UNKNOWN = TensorFacts(parameter=False)


@dataclass(frozen=True)
class _Target:
    """A version, and what is known beside the file."""

    version: str
    graph: Graph
    decompressed_bitwidth: int | None
    block_order: BlockOrder | None  # of flat block scales, in this version

    @property
    def split(self) -> bool:
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
        file: any version.
        version: one of `VERSIONS`.
        lossy: drop what the version cannot hold, instead of raising; an encoding that it cannot hold at all is dropped whole.
        graph: facts about the model's tensors, from `read_graph`: supplies axes and the parameters' names to a file that does not say them. What the graph
            says too is not lost.
        decompressed_bitwidth: of LPBQ encodings that do not say it (2.x).
        block_order: of the flat block scales in 1.0.0, read or written: "tensor", as the tensor lies, or "channel", by channel. By default that of the
            producer, where it is ours ("tensor"), and else unknown; it matters only where the two differ.

    Raises:
        ConversionError: the version or the order is unknown; something would be lost and `lossy` is False; or something is lacking, lossy or not.
    """
    if version not in VERSIONS:
        raise ConversionError(
            f"encodings version {shown(version)!r} is not one of {', '.join(VERSIONS)}", (), ()
        )
    if block_order is None and (file.producer or {}).get("package") == _OUR_PACKAGE:
        block_order = "tensor"
    if block_order not in (None, *BLOCK_ORDERS):
        raise ConversionError(
            f"block order {shown(str(block_order))!r} is not one of {', '.join(BLOCK_ORDERS)}",
            (),
            (),
        )
    there = _Target(version, graph or {}, decompressed_bitwidth, block_order)
    back = _Target(file.version, graph or {}, decompressed_bitwidth, block_order)
    lost: list[str] = []
    lacking: list[str] = []
    kept: list[Encoding] = []
    for original in file.encodings:
        encoding = _with_positive_axis(original, there.graph)
        projected, needs = _project(encoding, there)
        lacking += [f"{shown(encoding.name)}: {need}" for need in needs]
        if projected is None:
            lost.append(f"{shown(encoding.name)}: the whole encoding, {_described(encoding)}")
            continue
        kept.append(projected)
        if not needs:
            lost += _lost_fields(encoding, *_project(projected, back))
    parameters, lost_split = _project_parameters(file, {e.name for e in kept}, there, lacking)
    lost += lost_split
    for field in ("excluded_layers", "quantizer_args"):
        if not there.split and getattr(file, field) is not None:
            lost.append(f"file: {field}")
    if lacking or (lost and not lossy):
        raise ConversionError(f"encodings {file.version} -> {version}", lost, lacking)
    rest = (
        {"excluded_layers": file.excluded_layers, "quantizer_args": file.quantizer_args}
        if there.split
        else {}
    )
    return EncodingsFile(version, tuple(kept), parameters, producer=file.producer, **rest)  # type: ignore[arg-type]


def _lost_fields(encoding: Encoding, restored: Encoding | None, needs: list[str]) -> Iterable[str]:
    """What differs in `restored`, the encoding after going there and back, and what would have to be said for it not to differ."""
    if restored is None:
        return [f"{shown(encoding.name)}: {_described(encoding)}"]
    differences = encoding_differences(encoding, restored, unknown_differs=True)
    lost = [
        f"{shown(encoding.name)}: {d.field} {d.first}" for d in differences if d.first != "not said"
    ]
    return [*lost[:-1], f"{lost[-1]}; to come back needs {needs[0]}"] if lost and needs else lost


def _described(encoding: Encoding) -> str:
    kind = {IntegerEncoding: "integers", LpbqEncoding: "LPBQ", FloatEncoding: "floats"}[
        type(encoding)
    ]
    name = encoding.format if isinstance(encoding, FloatEncoding) else None
    return f"{kind} of {encoding.bitwidth} bits{f' ({name})' if name else ''}"


def _project_parameters(
    file: EncodingsFile, names: set[str], there: _Target, lacking: list[str]
) -> tuple[frozenset[str] | None, list[str]]:
    """Which of `names` are parameters, in the target; and what is lost of that."""
    known = file.parameters
    if known is None and there.split:
        unknown = sorted(names - there.graph.keys())
        lacking += [
            f"{shown(name)}: whether it is a parameter; give the model's graph (--onnx)"
            for name in unknown
        ]
        return frozenset(
            name for name in names if name in there.graph and there.graph[name].parameter
        ), []
    if known is None or there.split:
        return (known & names if known is not None else None), []
    unsaid = sorted(
        n for n in names if n not in there.graph or there.graph[n].parameter != (n in known)
    )
    if not unsaid:
        return None, []
    return None, [
        f"file: which of {len(unsaid)} encodings are parameters and which activations ({shown(', '.join(unsaid))})"
    ]


def _with_positive_axis(encoding: Encoding, graph: Graph) -> Encoding:
    shape = graph.get(encoding.name, _UNKNOWN).shape
    if (
        isinstance(encoding, LpbqEncoding)
        or encoding.axis is None
        or encoding.axis >= 0
        or shape is None
        or -encoding.axis > len(shape)
    ):
        return encoding
    return encoding.replace(axis=encoding.axis % len(shape))


def _project(encoding: Encoding, target: _Target) -> tuple[Encoding | None, list[str]]:
    """What the target can hold of an encoding, None where that is nothing; and what it needs beside that."""
    match encoding:
        case IntegerEncoding():
            return _project_integer(encoding, target)
        case LpbqEncoding():
            return _project_lpbq(encoding, target)
        case FloatEncoding():
            if (encoding.scale is None) != target.split or (
                encoding.format is None
            ) != target.split:
                return None, []
            return encoding, []


def _project_integer(encoding: IntegerEncoding, target: _Target) -> tuple[Encoding, list[str]]:
    facts = target.graph.get(encoding.name, _UNKNOWN)
    if target.split:
        encoding = _listed(encoding, facts.channel_axis, target.block_order, "scale", "offset")
        one = encoding.granularity == "tensor" or (
            target.version == "0.6.1" and encoding.scale.size == 1
        )
        shape: tuple[int, ...] = () if one else (encoding.scale.size,)
        block_size = None if target.version == "0.6.1" else encoding.block_size
        scale, offset = encoding.scale.reshape(shape), encoding.offset.reshape(shape)
        return encoding.replace(
            scale=scale, offset=offset, signed=None, axis=None, block_size=block_size
        ), []
    centred = bool((encoding.offset == encoding.centre).all())
    signed = encoding.symmetric if encoding.signed is None else encoding.signed
    changes: dict[str, Any] = {"symmetric": centred, "signed": signed}
    needs: list[str] = []
    if encoding.axis is None and encoding.granularity != "tensor":
        layout = (
            _channel_layout(encoding, facts)
            if encoding.block_size is None
            else _block_layout(encoding.scale.size, encoding.block_size, facts, target)
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
        encoding = _listed(encoding, encoding.channel_axis, target.block_order, "block_scale")
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
        facts = target.graph.get(encoding.name, _UNKNOWN)
        layout = _block_layout(encoding.block_scale.size, encoding.block_size, facts, target)
        if isinstance(layout, str):
            return projected, [layout]
        channel, rank = facts.channel_axis, len(layout.shape)
        if channel is None or layout.shape[channel] != encoding.channel_scale.size:
            return projected, [
                f"its channel axis: the graph's shape of it does not have {encoding.channel_scale.size} channels"
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
    """How a flat list of scales is nested: `axis` of the channels or blocks, `shape`, and the channel axis if the list goes by channel."""

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


def _listed(encoding: T, channel_axis: int | None, order: BlockOrder | None, *fields: str) -> T:
    """With the axes of nested block scales swapped where a flat list by channel wants them so."""
    axis = encoding.axis
    if (
        order != "channel"
        or encoding.block_size is None
        or axis is None
        or channel_axis is None
        or channel_axis < axis
    ):
        return encoding
    return encoding.replace(
        **{field: getattr(encoding, field).swapaxes(axis, channel_axis) for field in fields}
    )


def _channel_layout(encoding: IntegerEncoding, facts: TensorFacts) -> _Layout | str:
    """How the scales are nested, or what is lacking."""
    if facts.shape is None or facts.channel_axis is None:
        return "its channel axis; give the model's graph (--onnx), in which the op that reads the tensor implies one"
    if facts.shape[facts.channel_axis] != encoding.scale.size:
        return f"its channel axis: there are {encoding.scale.size} scales, but axis {facts.channel_axis} has {facts.shape[facts.channel_axis]} in the graph"
    return _Layout(facts.channel_axis, encoding.scale.shape)


def _block_layout(
    count: int, block_size: int, facts: TensorFacts, target: _Target
) -> _Layout | str:
    """How `count` block scales are nested, or what is lacking."""
    if facts.shape is None or facts.block_axis is None or facts.channel_axis is None:
        return "its block axis and the shape of its scales; give the model's graph (--onnx), in which the op that reads the tensor implies them"
    shape = tuple(
        -(-size // block_size) if axis == facts.block_axis else size
        for axis, size in enumerate(facts.shape)
    )
    shape = tuple(
        size if axis in (facts.block_axis, facts.channel_axis) else 1
        for axis, size in enumerate(shape)
    )
    if facts.shape[facts.block_axis] % block_size or _product(shape) != count:
        return f"the shape of its scales: blocks of {block_size} on a tensor of {list(facts.shape)} are not {count}"
    if facts.block_axis > facts.channel_axis:
        return _Layout(facts.block_axis, shape)
    if target.block_order is None:
        return (
            "the order of its block scales: 1.0.0 lists them as the tensor lies in some files and by channel in others, and these two differ here; "
            "say which (--block-order tensor, as AIMET's sim.onnx.export writes them, or --block-order channel, as its sim.export does)"
        )
    return _Layout(
        facts.block_axis, shape, facts.channel_axis if target.block_order == "channel" else None
    )


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
