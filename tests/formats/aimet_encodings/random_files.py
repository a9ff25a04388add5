"""Random encodings files of each version: channels on axis 0, blocks on axis 1."""

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
)

FILES = Path(__file__).parent / "files"

names = st.text(min_size=1, max_size=8)
positive = st.floats(2.0**-20, 2.0**10, width=32)


def arrays(draw: Any, shape: tuple[int, ...], values: st.SearchStrategy[Any], dtype: Any) -> Any:
    size = int(np.prod(shape))
    numbers = draw(st.lists(values, min_size=size, max_size=size))
    return np.array(numbers, dtype=dtype).reshape(shape)


@st.composite
def encodings(draw: Any, version: str, name: str = "w") -> Entry:
    """An encoding with the fields of `version`."""
    is_flat, has_blocks = version < "2", version != "0.6.1"
    channels, blocks, size = (draw(st.integers(1, most)) for most in (3, 3, 4))
    kind = draw(st.sampled_from(["integer"] * 3 + ["float"] + ["lpbq"] * has_blocks))
    if kind == "lpbq":
        return draw(lpbq(version, name, channels, blocks, size))
    granularity = draw(st.sampled_from(["tensor", "channel"] + ["block"] * has_blocks))
    if version == "0.6.1" and channels == 1:
        granularity = "tensor"
    nested = (channels * blocks,) if is_flat else (channels, blocks)
    shape = {"tensor": (), "channel": (channels,), "block": nested}[granularity]
    layout: dict[str, Any] = {"block_size": size if granularity == "block" else None, "axis": None}
    if not is_flat and granularity != "tensor":
        layout["axis"] = 1 if granularity == "block" else draw(st.sampled_from([0, -2]))
    if kind == "float" and is_flat:
        return FloatEncoding(name, draw(st.sampled_from([8, 16, 32])))
    scale = arrays(draw, shape, positive, float)
    if kind == "float":
        dtype = draw(st.sampled_from(sorted(FLOAT_FORMATS)))
        return FloatEncoding(name, FLOAT_FORMATS[dtype], dtype, scale, **layout)
    bitwidth, shift = draw(st.integers(1, 16)), draw(st.sampled_from([0.0, 0.0, 0.5]))
    center, lowest = -(2 ** (bitwidth - 1)), -(2**bitwidth - 1)
    offset = np.full(shape, center)
    if draw(st.booleans()):
        offset = arrays(draw, shape, st.integers(lowest, 0), np.int64)
    symmetric, signed = draw(st.booleans()), None
    if not is_flat:
        symmetric, signed = bool((offset == center).all()), symmetric
    grid = IntegerEncoding(name, bitwidth, scale, offset, symmetric, signed, **layout)
    return grid.replace(zero_point_shift=shift)


@st.composite
def lpbq(draw: Any, version: str, name: str, channels: int, blocks: int, size: int) -> LpbqEncoding:
    bitwidth, decompressed = draw(st.integers(2, 4)), draw(st.integers(5, 8))
    integers = st.integers(1, 2 ** (decompressed - bitwidth))
    block_scale = arrays(draw, (channels, blocks), integers, np.int64)
    channel_scale = arrays(draw, (channels, 1), positive, float)
    if version == "1.0.0":
        flat = (scale.reshape(-1) for scale in (block_scale, channel_scale))
        return LpbqEncoding(name, bitwidth, size, *flat, decompressed)
    return LpbqEncoding(name, bitwidth, size, block_scale, channel_scale, axis=1)


@st.composite
def files(draw: Any, version: str) -> EncodingsFile:
    """A file with any of the version's fields."""
    chosen = draw(st.lists(names, unique=True, max_size=4))
    some = tuple(draw(encodings(version, name)) for name in chosen)
    fields: dict[str, Any] = {
        "producer": draw(st.none() | st.just({"package": "qwlora", "version": "1"}))
    }
    if version < "2":
        fields["parameters"] = frozenset(name for name in chosen if draw(st.booleans()))
        fields["excluded_layers"] = draw(st.none() | st.lists(names, max_size=2).map(tuple))
        values = st.booleans() | st.integers() | st.floats(-10, 10) | st.text()
        settings = st.dictionaries(names, values, max_size=2)
        fields["quantizer_args"] = draw(st.none() | settings)
    return EncodingsFile(version, some, **fields)
