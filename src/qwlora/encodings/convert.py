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

A field is *lost* when converting back gives another value: that is the definition, and the code. What a target needs and the source does not say (an axis,
which names are parameters, the decompressed bitwidth) is *lacking*: it comes from the model's graph or from the caller, or there is no conversion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qwlora.encodings.diff import encoding_differences
from qwlora.encodings.fields import shown
from qwlora.encodings.graph import Graph, TensorFacts
from qwlora.encodings.list_versions import channel_axis_of, channel_shape
from qwlora.encodings.model import VERSIONS, Encoding, EncodingsFile, FloatEncoding, IntegerEncoding, LpbqEncoding
from qwlora.errors import ConversionError

_UNKNOWN = TensorFacts(parameter=False)


@dataclass(frozen=True)
class _Target:
    """A version, and what is known beside the file."""

    version: str
    graph: Graph
    decompressed_bitwidth: int | None

    @property
    def split(self) -> bool:
        return self.version < "2"


def convert(file: EncodingsFile, version: str, lossy: bool = False, *, graph: Graph | None = None, decompressed_bitwidth: int | None = None) -> EncodingsFile:
    """`file` in another version.

    Args:
        file: any version.
        version: one of `VERSIONS`.
        lossy: drop what the version cannot hold, instead of raising; an encoding that it cannot hold at all is dropped whole.
        graph: facts about the model's tensors, from `read_graph`: supplies axes and the parameters' names to a file that does not say them. What the graph
            says too is not lost.
        decompressed_bitwidth: of LPBQ encodings that do not say it (2.x).

    Raises:
        ConversionError: something would be lost and `lossy` is False; or something is lacking, lossy or not.
    """
    if version not in VERSIONS:
        raise ConversionError(f"encodings version {shown(version)!r} is not one of {', '.join(VERSIONS)}", (), ())
    there = _Target(version, graph or {}, decompressed_bitwidth)
    back = _Target(file.version, graph or {}, decompressed_bitwidth)
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
            lost += _lost_fields(encoding, _project(projected, back)[0])
    parameters, lost_split = _project_parameters(file, {e.name for e in kept}, there, lacking)
    lost += lost_split
    for field in ("excluded_layers", "quantizer_args"):
        if not there.split and getattr(file, field) is not None:
            lost.append(f"file: {field}")
    if lacking or (lost and not lossy):
        raise ConversionError(f"encodings {file.version} -> {version}", lost, lacking)
    rest = {"excluded_layers": file.excluded_layers, "quantizer_args": file.quantizer_args} if there.split else {}
    return EncodingsFile(version, tuple(kept), parameters, producer=file.producer, **rest)  # type: ignore[arg-type]


def _lost_fields(encoding: Encoding, restored: Encoding | None) -> Iterable[str]:
    if restored is None:
        return [f"{shown(encoding.name)}: {_described(encoding)}"]
    differences = encoding_differences(encoding, restored, unknown_differs=True)
    return [f"{shown(encoding.name)}: {d.field} {d.first}" for d in differences if d.first != "not said"]


def _described(encoding: Encoding) -> str:
    kind = {IntegerEncoding: "integers", LpbqEncoding: "LPBQ", FloatEncoding: "floats"}[type(encoding)]
    name = encoding.format if isinstance(encoding, FloatEncoding) else None
    return f"{kind} of {encoding.bitwidth} bits{f' ({name})' if name else ''}"


def _project_parameters(file: EncodingsFile, names: set[str], there: _Target, lacking: list[str]) -> tuple[frozenset[str] | None, list[str]]:
    """Which of `names` are parameters, in the target; and what is lost of that."""
    known = file.parameters
    if known is None and there.split:
        unknown = sorted(names - there.graph.keys())
        lacking += [f"{shown(name)}: whether it is a parameter; give the model's graph (--onnx)" for name in unknown]
        return frozenset(name for name in names if name in there.graph and there.graph[name].parameter), []
    if known is None or there.split:
        return (known & names if known is not None else None), []
    unsaid = sorted(n for n in names if n not in there.graph or there.graph[n].parameter != (n in known))
    if not unsaid:
        return None, []
    return None, [f"file: which of {len(unsaid)} encodings are parameters and which activations ({shown(', '.join(unsaid))})"]


def _with_positive_axis(encoding: Encoding, graph: Graph) -> Encoding:
    shape = graph.get(encoding.name, _UNKNOWN).shape
    if isinstance(encoding, LpbqEncoding) or encoding.axis is None or encoding.axis >= 0 or shape is None or -encoding.axis > len(shape):
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
            if (encoding.scale is None) != target.split or (encoding.format is None) != target.split:
                return None, []
            return encoding, []


def _project_integer(encoding: IntegerEncoding, target: _Target) -> tuple[Encoding, list[str]]:
    if target.split:
        one = encoding.granularity == "tensor" or (target.version == "0.6.1" and encoding.scale.size == 1)
        shape: tuple[int, ...] = () if one else (encoding.scale.size,)
        block_size = None if target.version == "0.6.1" else encoding.block_size
        scale, offset = encoding.scale.reshape(shape), encoding.offset.reshape(shape)
        return encoding.replace(scale=scale, offset=offset, signed=None, axis=None, block_size=block_size), []
    centred = bool((encoding.offset == encoding.centre).all())
    signed = encoding.symmetric if encoding.signed is None else encoding.signed
    changes: dict[str, Any] = {"symmetric": centred, "signed": signed}
    needs: list[str] = []
    if encoding.axis is None and encoding.granularity != "tensor":
        facts = target.graph.get(encoding.name, _UNKNOWN)
        layout = _channel_layout(encoding, facts) if encoding.block_size is None else _block_layout(encoding.scale.size, encoding.block_size, facts)
        if isinstance(layout, str):
            needs.append(layout)
        else:
            axis, shape = layout
            changes |= {"axis": axis, "scale": encoding.scale.reshape(shape), "offset": encoding.offset.reshape(shape)}
    return encoding.replace(**changes), needs


def _project_lpbq(encoding: LpbqEncoding, target: _Target) -> tuple[Encoding | None, list[str]]:
    if target.version == "0.6.1":
        return None, []
    if target.version == "1.0.0":
        decompressed = encoding.decompressed_bitwidth or target.decompressed_bitwidth
        flat = {"block_scale": encoding.block_scale.reshape(-1), "channel_scale": encoding.channel_scale.reshape(-1)}
        needs = [] if decompressed else ["its decompressed bitwidth (--decompressed-bitwidth)"]
        return encoding.replace(**flat, decompressed_bitwidth=decompressed, axis=None, channel_axis=None), needs
    projected = encoding.replace(decompressed_bitwidth=None)
    if encoding.axis is None:
        facts = target.graph.get(encoding.name, _UNKNOWN)
        layout = _block_layout(encoding.block_scale.size, encoding.block_size, facts)
        if isinstance(layout, str):
            return projected, [layout]
        axis, shape = layout
        channel = facts.channel_axis
        if channel is None or shape[channel] != encoding.channel_scale.size:
            return projected, [f"its channel axis: the graph's shape of it does not have {encoding.channel_scale.size} channels"]
        channel_scale = encoding.channel_scale.reshape(channel_shape(len(shape), channel))
        projected = projected.replace(axis=axis, channel_axis=channel, block_scale=encoding.block_scale.reshape(shape), channel_scale=channel_scale)
    assert projected.axis is not None
    if target.version == "2.0.0":
        return projected.replace(channel_axis=channel_axis_of(projected.channel_scale.shape, projected.axis)), []
    along = [axis for axis, size in enumerate(projected.channel_scale.shape) if size > 1]
    channel = projected.channel_axis
    if len(along) > 1 or (channel is not None and projected.channel_scale.size != projected.block_scale.shape[channel]):
        return None, []
    return projected, ([] if channel is not None else ["its channel axis, which its shapes leave open"])


def _channel_layout(encoding: IntegerEncoding, facts: TensorFacts) -> tuple[int, tuple[int, ...]] | str:
    """The channel axis and the scale's shape, or what is lacking."""
    if facts.shape is None or facts.channel_axis is None:
        return "its channel axis; give the model's graph (--onnx), in which the op that reads the tensor implies one"
    if facts.shape[facts.channel_axis] != encoding.scale.size:
        return f"its channel axis: there are {encoding.scale.size} scales, but axis {facts.channel_axis} has {facts.shape[facts.channel_axis]} in the graph"
    return facts.channel_axis, encoding.scale.shape


def _block_layout(count: int, block_size: int, facts: TensorFacts) -> tuple[int, tuple[int, ...]] | str:
    """The block axis and the shape of `count` block scales, or what is lacking."""
    if facts.shape is None or facts.block_axis is None or facts.channel_axis is None:
        return "its block axis and the shape of its scales; give the model's graph (--onnx), in which the op that reads the tensor implies them"
    if facts.block_axis < facts.channel_axis:
        return "the order of its scales: 1.0.0 lists blocks by output channel in some files and as the tensor lies in others, and these two differ here"
    shape = tuple(-(-size // block_size) if axis == facts.block_axis else size for axis, size in enumerate(facts.shape))
    shape = tuple(size if axis in (facts.block_axis, facts.channel_axis) else 1 for axis, size in enumerate(shape))
    if facts.shape[facts.block_axis] % block_size or _product(shape) != count:
        return f"the shape of its scales: blocks of {block_size} on a tensor of {list(facts.shape)} are not {count}"
    return facts.block_axis, shape


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
