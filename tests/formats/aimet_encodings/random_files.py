"""Random encodings files of each version, and their graphs.

Weights are [out, in] and read by a Conv: channels on axis 0, blocks on axis 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from qwlora.formats.aimet_encodings import (
    FLOAT_FORMATS,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    OnnxTensor,
)

FILES = Path(__file__).parent / "files"
DECOMPRESSED_BITWIDTH = 8

names = st.text(min_size=1, max_size=8)
positive = st.floats(2.0**-20, 2.0**10, width=32)


def arrays(draw: Any, shape: tuple[int, ...], values: st.SearchStrategy[Any], dtype: Any) -> Any:
    size = int(np.prod(shape))
    return np.array(draw(st.lists(values, min_size=size, max_size=size)), dtype=dtype).reshape(
        shape
    )


@st.composite
def encodings(draw: Any, version: str, name: str = "w") -> tuple[Entry, OnnxTensor]:
    """An encoding with the fields of `version`, and its tensor."""
    split = version < "2"
    channels, blocks, block_size = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    tensor = OnnxTensor(draw(st.booleans()), (channels, blocks * block_size), 0, 1)
    kind = draw(
        st.sampled_from(
            ["integer", "integer", "integer", "float"] + (["lpbq"] if version != "0.6.1" else [])
        )
    )
    if kind == "lpbq":
        return draw(lpbq(version, name, channels, blocks, block_size)), tensor
    granularity = draw(
        st.sampled_from(["tensor", "channel"] + (["block"] if version != "0.6.1" else []))
    )
    if version == "0.6.1" and channels == 1:
        granularity = "tensor"
    shape = {
        "tensor": (),
        "channel": (channels,),
        "block": (channels * blocks,) if split else (channels, blocks),
    }[granularity]
    layout: dict[str, Any] = {"block_size": block_size if granularity == "block" else None}
    layout["axis"] = (
        None
        if split or granularity == "tensor"
        else 1
        if granularity == "block"
        else draw(st.sampled_from([0, -2]))
    )
    if kind == "float":
        if split:
            return FloatEncoding(name, draw(st.sampled_from([8, 16, 32]))), tensor
        chosen = draw(st.sampled_from(sorted(FLOAT_FORMATS)))
        return FloatEncoding(
            name, FLOAT_FORMATS[chosen], chosen, arrays(draw, shape, positive, float), **layout
        ), tensor
    return draw(integer(version, name, shape, layout)), tensor


@st.composite
def integer(
    draw: Any, version: str, name: str, shape: tuple[int, ...], layout: dict[str, Any]
) -> IntegerEncoding:
    bitwidth = draw(st.integers(1, 16))
    center, lowest = -(2 ** (bitwidth - 1)), -(2**bitwidth - 1)
    offset = (
        np.full(shape, center)
        if draw(st.booleans())
        else arrays(draw, shape, st.integers(lowest, 0), np.int64)
    )
    centered = bool((offset == center).all())
    symmetric, signed = (
        (draw(st.booleans()), None) if version < "2" else (centered, draw(st.booleans()))
    )
    return IntegerEncoding(
        name,
        bitwidth,
        arrays(draw, shape, positive, float),
        offset,
        symmetric,
        signed,
        **layout,
        zero_point_shift=draw(st.sampled_from([0.0, 0.0, 0.5])),
    )


@st.composite
def lpbq(
    draw: Any, version: str, name: str, channels: int, blocks: int, block_size: int
) -> LpbqEncoding:
    bitwidth, decompressed = draw(st.integers(2, 4)), draw(st.integers(5, 8))
    block_scale = arrays(
        draw, (channels, blocks), st.integers(1, 2 ** (decompressed - bitwidth)), np.int64
    )
    channel_scale = arrays(draw, (channels, 1), positive, float)
    if version == "1.0.0":
        return LpbqEncoding(
            name,
            bitwidth,
            block_size,
            block_scale.reshape(-1),
            channel_scale.reshape(-1),
            decompressed,
        )
    return LpbqEncoding(
        name, bitwidth, block_size, block_scale, channel_scale, axis=1, channel_axis=0
    )


@st.composite
def files(draw: Any, version: str) -> tuple[EncodingsFile, dict[str, OnnxTensor]]:
    """A file with any of the version's fields, and a matching graph."""
    some = [
        draw(encodings(version, name)) for name in draw(st.lists(names, unique=True, max_size=4))
    ]
    graph = {encoding.name: tensor for encoding, tensor in some}
    parameters = (
        frozenset(e.name for e, tensor in some if tensor.parameter) if version < "2" else None
    )
    producer = draw(st.none() | st.just({"package": "qwlora", "version": "1"}))
    extra: dict[str, Any] = {}
    if version < "2":
        extra["excluded_layers"] = draw(st.none() | st.lists(names, max_size=2).map(tuple))
        extra["quantizer_args"] = draw(
            st.none()
            | st.dictionaries(
                names, st.booleans() | st.integers() | st.floats(-10, 10) | st.text(), max_size=2
            )
        )
    return EncodingsFile(
        version, tuple(e for e, _ in some), parameters, producer=producer, **extra
    ), graph
