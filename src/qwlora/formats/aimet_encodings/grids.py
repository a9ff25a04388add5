"""Grids of tensors as entries of an encodings file, and back. The only writer of entries.

    grid               entry                                       2.x                 before 2.0
    PerTensor()        IntegerEncoding, scale []                   no axis             PER_TENSOR
    PerChannel(axis)   IntegerEncoding, scale [A]                  axis                PER_CHANNEL
    PerBlock(size)     IntegerEncoding, scale [out, in / size]     axis, block_size    PER_BLOCK
    SignedBlock(size)  as PerBlock, asymmetric and with positive scales
    Lpbq(size)         LpbqEncoding, block and channel scales      axis, block_size    LPBQ
    a float offset     refused; read from a zero point shift of half a step

An entry describes the tensor that its exporter saw; our quantized matrices are [out, in]. AIMET's
`sim.export` uses torch's names and layouts. Its `sim.onnx.export` uses names of ONNX tensors: the
weight of a MatMul is stored [in, out] under the parameter's name and a number (`fc.weight_0`). So a
`TensorLayout` says whether the entry's tensor is transposed, which swaps scales and axes.

Versions before 2.0 have no axis and list blocks in one flat list: in the order of the tensor, or
channel by channel, as aimet-onnx reads them.

A zero point shift of half a step is a float offset:

    AIMET    x_hat = (q + offset + 0.5) * scale
    here     x_hat = q * scale + minimum,  minimum = (offset + 0.5) * scale

Both have the same codes. Values differ by the rounding of float32.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qwlora.errors import EncodingsFileError, GridError, SourceError
from qwlora.formats.aimet_encodings.encodings_file import write_encodings
from qwlora.formats.aimet_encodings.model import (
    BlockOrder,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    has_axes,
)
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.encoding import Encoding
from qwlora.grid.scheme import Blocks, Granularity, Lpbq, PerBlock, PerChannel, PerTensor, Scheme

# AIMET's names for the observers that it has; others keep our names, with underscores.
_QUANT_SCHEMES = {
    "min-max": "min_max",
    "sqnr": "post_training_tf_enhanced",
    "percentile": "post_training_percentile",
}


def write_graph_encodings(
    graph: QuantizedGraph,
    path: Path,
    transposed: Collection[str] = (),
    version: str = "1.0.0",
    float_model: tuple[Mapping[str, Encoding], Collection[str], Sequence[str]] | None = None,
    kinds: Collection[Kind] = tuple(Kind),
) -> None:
    """Write every encoding of an exported model, activations first.

    Args:
        transposed: names of the weights that are stored as [in, out].
        version: 1.0.0, or 2.0.0 of a float model.
        float_model: grids by name of the tensor; which of these are parameters; float tensors
            without a grid. Default: a QDQ model, whose tensors are the marks of `graph`.
        kinds: which values of a QDQ model to write encodings for.
    """
    marks = [mark for mark in graph.marks if mark.kind in kinds]
    grids: Mapping[str, Encoding] = {mark.name: graph.encodings[mark.name] for mark in marks}
    parameters: Collection[str] = {m.name for m in marks if m.kind is not Kind.ACTIVATION}
    floats: Sequence[str] = ()
    # A QDQ model has blocks in the order of the tensor ([in / block, out] for the weight of a
    # MatMul), as in AIMET's own ONNX export. aimet-onnx reads the float model, and expects them
    # channel by channel, however the tensor is stored; `block_order` of the producer says so.
    order: BlockOrder = "tensor"
    if float_model is not None:
        grids, parameters, floats = float_model
        order = "channel"
    # No file can hold float offsets.
    excluded = [name for name, grid in grids.items() if grid.scheme.float_offset]
    producer = {"package": "qwlora", "version": version_of("qwlora")}
    sections: dict[str, Any] = {
        "parameters": frozenset(parameters).difference(excluded),
        "excluded_layers": tuple(name.removesuffix(".weight") for name in excluded),
        "quantizer_args": _quantizer_args(graph),
    }
    entries: list[Entry] = [
        entry_of(name, grids[name], version, name in transposed, order)
        for name in sorted(grids, key=parameters.__contains__)
        if name not in excluded
    ]
    # 1.0.0 lists a tensor without a grid as a 16-bit float; 2.0.0 cannot express that.
    file = EncodingsFile(
        version,
        (*entries, *(FloatEncoding(name, 16) for name in floats if version < "2")),
        producer=producer | ({"block_order": order} if order == "channel" else {}),
        **(sections if version < "2" else {}),
    )
    write_encodings(file, path)


def _quantizer_args(graph: QuantizedGraph) -> dict[str, Any]:
    """AIMET's settings of a model: first activation grid, first base weight grid, observer."""
    by_kind = {m.kind: graph.encodings[m.name].scheme for m in reversed(graph.marks)}
    activation = by_kind.get(Kind.ACTIVATION)
    weight = by_kind.get(Kind.BASE, by_kind.get(Kind.PARAMETER))
    return {
        "activation_bitwidth": activation.bitwidth if activation else 32,
        "dtype": "int",
        "is_symmetric": weight.symmetric if weight else True,
        "param_bitwidth": weight.bitwidth if weight else 32,
        "per_channel_quantization": weight is not None
        and not isinstance(weight.granularity, PerTensor),
        "quant_scheme": _QUANT_SCHEMES.get(graph.observer, graph.observer.replace("-", "_")),
    }


@dataclass(frozen=True)
class TensorLayout:
    """A parameter and the layout of the entry's tensor.

    Args:
        shape: of the parameter with its matrix as [out, in].
        transposed: the entry's tensor is [in, out].
        channel_axis: the output axis of `shape`.
        block_order: of flat block scales; None if unknown.
    """

    shape: tuple[int, ...]
    transposed: bool = False
    channel_axis: int = 0
    block_order: BlockOrder | None = None

    def axis(self, axis: int) -> int:
        """An axis of the entry's tensor as an axis of `shape`."""
        rank = len(self.shape)
        if not -rank <= axis < rank:
            raise GridError(f"axis {axis} is outside of a tensor with {rank} axes")
        return rank - 1 - axis % rank if self.transposed else axis % rank


def entry_of(
    name: str,
    encoding: Encoding,
    version: str,
    transposed: bool = False,
    block_order: BlockOrder = "tensor",
) -> Entry:
    """The entry that describes `encoding`, of a tensor [..., out, in], in a file of `version`.

    Args:
        transposed: the tensor of that name is stored [in, out].
        block_order: of flat block scales (before 2.0).

    Raises:
        EncodingsFileError: the encoding has float offsets.
    """
    encoding = encoding.with_positive_scales()
    scheme = encoding.scheme
    if scheme.float_offset:
        problem = f"{scheme} has float offsets, which no encodings file can hold"
        raise EncodingsFileError(name, [problem])
    scale, offset = encoding.scale.detach().cpu(), encoding.offset.cpu()
    nested = has_axes(version)
    is_turned = transposed and (nested or block_order == "tensor")
    last = 0 if transposed else scale.ndim - 1  # the axis of the inputs

    def arranged(values: Tensor) -> npt.NDArray[Any]:
        array = values.numpy().T if is_turned else values.numpy()
        return array if nested or not array.ndim else array.reshape(-1)

    axis: int | None = None
    size: int | None = None
    match scheme.granularity:
        case PerTensor():
            pass
        case PerChannel(axis):
            axis = 1 - axis if transposed else axis
        case PerBlock(size):
            axis = last
        case Lpbq(size, scale_bitwidth):
            row, integers = scheme.granularity.split(scale)
            return LpbqEncoding(
                name,
                scheme.bitwidth,
                size,
                arranged(integers),
                arranged(row.double()),
                None if nested else scheme.bitwidth + scale_bitwidth,
                last if nested else None,
            )
        case Blocks() as blocks:
            raise GridError(f"{scheme}: AIMET's files have no blocks of kind {blocks.kind}")
    # In 2.x symmetric means that every offset is at the center. `signed` keeps what was requested.
    centered = bool((offset == scheme.symmetric_offset).all())
    return IntegerEncoding(
        name,
        scheme.bitwidth,
        arranged(scale.double()),
        arranged(offset),
        centered if nested else scheme.symmetric,
        scheme.symmetric if nested else None,
        axis if nested else None,
        size,
    )


def encoding_of(entry: Entry) -> Encoding:
    """Undo `entry_of` for an entry of version 2.x whose tensor is stored [..., out, in].

    Raises:
        EncodingsFileError: the entry is a float format or has a zero point shift.
        SourceError: no grid can express it.
    """
    if isinstance(entry, LpbqEncoding):
        *rows, blocks = entry.block_scale.shape
        return grid_of(entry, TensorLayout((*rows, blocks * entry.block_size)), "2.1.0")
    if isinstance(entry, FloatEncoding) or entry.zero_point_shift:
        raise EncodingsFileError(entry.name, ["is not a plain integer grid"])
    granularity: Granularity = PerTensor()
    if entry.block_size:
        granularity = PerBlock(entry.block_size)
    elif entry.axis is not None:
        granularity = PerChannel(entry.axis)
    scheme = Scheme(entry.bitwidth, bool(entry.signed), granularity)
    return Encoding(scheme, _floats(entry.scale), _integers(entry.offset))


def grid_of(entry: Entry, layout: TensorLayout, version: str) -> Encoding:
    """The grid of a parameter.

    Raises:
        SourceError: no grid can express the entry, the entry does not fit the shape, or the order
            of its blocks is unknown. The message does not contain the entry's name.
    """
    try:
        match entry:
            case IntegerEncoding():
                return _integer_grid(entry, layout, version)
            case LpbqEncoding():
                return _lpbq_grid(entry, layout)
            case FloatEncoding():
                raise SourceError(f"is a float of {entry.bitwidth} bits, not a grid of integers")
    except GridError as error:
        raise SourceError(str(error)) from error


def _integer_grid(entry: IntegerEncoding, layout: TensorLayout, version: str) -> Encoding:
    scale, offset, size = entry.scale, entry.offset, entry.block_size
    granularity: Granularity
    if size is not None:
        granularity = PerBlock(size)
        scale, offset = (_blocks(values, entry.axis, size, layout) for values in (scale, offset))
    elif scale.size == 1:
        granularity, scale, offset = PerTensor(), scale.reshape(()), offset.reshape(())
    else:
        axis = layout.channel_axis if entry.axis is None else layout.axis(entry.axis)
        granularity = PerChannel(axis)
        if scale.size != layout.shape[axis]:
            hint = ""
            # 0.6.1 lists blocks as channels: out * k scales are k blocks along the input. For LPBQ
            # these scales are the products. If there are as many scales as inputs, they could also
            # be one per input, so the file is refused.
            if version == "0.6.1" and len(layout.shape) == 2:
                rows, columns = layout.shape
                blocks, rest = divmod(scale.size, rows)
                if scale.size != columns and not rest and columns % blocks == 0:
                    blocked = entry.replace(block_size=columns // blocks)
                    return _integer_grid(blocked, layout, version)
                hint = "; version 0.6.1 lists scales of blocks as channels and loses their shape"
                meant = " (one per input, or blocks)" if scale.size == columns else ""
                hint = f"{hint}{meant}: export 1.0.0 or later"
            raise SourceError(
                f"has {scale.size} scales, but axis {axis} of {list(layout.shape)} has "
                f"{layout.shape[axis]}{hint}"
            )
    if entry.zero_point_shift:
        scheme = Scheme(entry.bitwidth, symmetric=False, granularity=granularity, float_offset=True)
        return Encoding(scheme, _floats(scale), _floats((offset + entry.zero_point_shift) * scale))
    scheme = Scheme(entry.bitwidth, entry.is_centered, granularity)
    return Encoding(scheme, _floats(scale), _integers(offset))


def _lpbq_grid(entry: LpbqEncoding, layout: TensorLayout) -> Encoding:
    integers = _blocks(entry.block_scale, entry.axis, entry.block_size, layout)
    channel = entry.channel_scale.reshape(-1, 1)
    if entry.axis is not None and entry.channel_scale.ndim > 1:
        channel = entry.channel_scale.T if layout.transposed else entry.channel_scale
    if any(count % size for count, size in zip(integers.shape, channel.shape, strict=True)):
        raise SourceError(
            f"has channel scales of shape {list(channel.shape)}, which {list(integers.shape)} "
            "blocks cannot share evenly"
        )
    for axis, count in enumerate(integers.shape):
        channel = channel.repeat(count // channel.shape[axis], axis)
    scale = _floats(integers) * _floats(channel)
    bits = max(1, int(integers.max() - 1).bit_length())
    if entry.decompressed_bitwidth is not None:
        bits = entry.decompressed_bitwidth - entry.bitwidth
    granularity: Granularity
    try:
        granularity = Lpbq(entry.block_size, bits)
        granularity.split(scale)
    # The factors are not recoverable if a row lacks the largest integer.
    except GridError:
        granularity = PerBlock(entry.block_size)
    scheme = Scheme(entry.bitwidth, True, granularity)
    offset = torch.full(scale.shape, scheme.symmetric_offset, dtype=torch.int32)
    return Encoding(scheme, scale, offset)


def _blocks(
    values: npt.NDArray[Any], axis: int | None, size: int, layout: TensorLayout
) -> npt.NDArray[Any]:
    """Values of blocks as [..., out, in / size]."""
    *rows, columns = layout.shape
    if len(layout.shape) != 2 or columns % size:
        raise SourceError(
            f"has blocks of {size}, which do not divide the inputs of a matrix of shape "
            f"{list(layout.shape)}"
        )
    expected = (*rows, columns // size)
    mismatch = f"blocks, but a matrix of shape {list(layout.shape)} needs {list(expected)}"
    if axis is not None:
        values = values.T if layout.transposed else values
        if layout.axis(axis) != 1:
            raise SourceError("has blocks along the output; quantize with blocks along the input")
        sizes = zip(values.shape, expected, strict=True)
        if values.ndim != 2 or any(size not in (1, most) for size, most in sizes):
            raise SourceError(f"has {list(values.shape)} {mismatch}")
        return np.broadcast_to(values, expected)
    if values.size != expected[0] * expected[1]:
        raise SourceError(f"has {values.size} {mismatch}")
    by_order: dict[BlockOrder, npt.NDArray[Any]] = {
        "channel": values.reshape(expected),
        "tensor": values.reshape(expected[::-1]).T,
    }
    if layout.block_order is not None:
        return by_order[layout.block_order]
    # Guessing would give a wrong model. It need not be known where both readings agree.
    if not np.array_equal(by_order["channel"], by_order["tensor"]):
        raise SourceError(
            "is a flat list of blocks in an unknown order: by output channel, or as a tensor "
            "stored [in, out]. Set model.block_order: channel or tensor in the recipe "
            "(block_order='channel' or 'tensor' in Python), or export version 2.0.0"
        )
    return by_order["channel"]


def _floats(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _integers(values: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int32))
