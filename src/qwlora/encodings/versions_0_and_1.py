"""Versions 0.6.1 and 1.0.0: separate sections of activations and parameters, no axis.

    {version, producer, activation_encodings, param_encodings, excluded_layers, quantizer_args}

0.6.1: a section is an object. Under each name is a list with one item per channel, or one for
floats:

    {min, max, scale, offset, bitwidth, dtype: "int", is_symmetric: "True" | "False"
    [, zero_point_shift]}
    {bitwidth, dtype: "float"}

`min = offset * scale` and `max = (offset + 2^bitwidth - 1) * scale` are redundant: computed when
written, and when read they must agree within half a step.

1.0.0: a section is a list of

    {name, dtype: "INT", bw, is_sym, enc_type: PER_TENSOR | PER_CHANNEL | PER_BLOCK, scale, offset
    [, block_size][, zero_point_shift]}
    {name, dtype: "INT", bw, compressed_bw, is_sym: true, enc_type: LPBQ, scale, offset, block_size,
    per_block_int_scale}
    {name, dtype: "FLOAT", bw, enc_type: PER_TENSOR}

Vector quantization (enc_type VECTOR) is refused by name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qwlora.encodings.json_fields import (
    FieldError,
    Record,
    all_equal,
    integer_of,
    numbers_of,
    text_of,
)
from qwlora.encodings.model import (
    MAX_BITWIDTH,
    Encoding,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    LpbqEncoding,
)

_VECTOR_FIELDS = ("rows_per_block", "cols_per_block", "vector_dim", "vector_stride", "index_bw")
_REFUSED = "is vector quantization, which is not supported"


def parse_0_6_1(name: str, items: Any, report: Record) -> Encoding | None:
    """The encoding under `name`; None, with a finding, if it is malformed."""
    if not isinstance(items, list) or not items:
        report.error("", "must be a list with one item per channel")
        return None
    if not all(isinstance(item, dict) for item in items):
        report.error("", "contains an item that is not an object")
        return None
    if any(key in item for item in items for key in _VECTOR_FIELDS):
        report.error("", _REFUSED)
        return None
    first = Record(items[0], name, report.findings)
    if first.text("dtype", ("int", "float")) == "float":
        return _parse_float_0_6_1(name, items, first)
    if first.values.get("dtype") != "int":
        return None
    return _parse_integer_0_6_1(name, items, report)


def _parse_float_0_6_1(name: str, items: list[Any], record: Record) -> Encoding | None:
    bitwidth = record.bitwidth("bitwidth")
    record.close()
    if len(items) > 1:
        record.error("", f"has {len(items)} items; a float encoding has one")
    return FloatEncoding(name, bitwidth) if bitwidth is not None else None


def _parse_integer_0_6_1(name: str, items: list[Any], report: Record) -> Encoding | None:
    def column(key: str, check: Any) -> Any:
        try:
            return check([item[key] for item in items])
        except KeyError:
            report.error(key, "is missing")
        except FieldError as error:
            report.error(key, str(error))
        return None

    def constant(check: Any) -> Any:
        def checked(values: list[Any]) -> Any:
            if not all_equal(values):
                raise FieldError("differs among the channels")
            return check(values[0])

        return checked

    column("dtype", constant(lambda v: text_of(v, ("int",))))
    bitwidth = column("bitwidth", constant(lambda v: integer_of(v, 1, MAX_BITWIDTH)))
    symmetric = column("is_symmetric", constant(lambda v: text_of(v, ("True", "False")) == "True"))
    scale = Record({"scale": [i.get("scale") for i in items]}, name, report.findings).scales(
        "scale"
    )
    offset = Record({"offset": [i.get("offset") for i in items]}, name, report.findings).integers(
        "offset"
    )
    low, high = column("min", numbers_of), column("max", numbers_of)
    has_shift = any("zero_point_shift" in item for item in items)
    shift = column("zero_point_shift", constant(_shift_of)) if has_shift else 0.0
    known = {
        "min",
        "max",
        "scale",
        "offset",
        "bitwidth",
        "dtype",
        "is_symmetric",
        "zero_point_shift",
    }
    for key in sorted(set().union(*items) - known):
        report.error(key, "is not a field of this entry in this version")
    flat = all(a is not None and a.ndim == 1 for a in (scale, offset, low, high))
    if bitwidth is None or symmetric is None or shift is None or not flat:
        if all(a is not None for a in (scale, offset, low, high)) and not flat:
            report.error("", "scale, offset, min and max are single numbers in each item")
        return None
    shape = () if len(items) == 1 else (len(items),)
    encoding = IntegerEncoding(
        name,
        bitwidth,
        scale.reshape(shape),  # type: ignore[union-attr]
        offset.reshape(shape),  # type: ignore[union-attr]
        symmetric,
        zero_point_shift=shift,
    )
    _check_range(encoding, low, high, report)
    return encoding


def _check_range(encoding: IntegerEncoding, low: Floats, high: Floats, report: Record) -> None:
    for key, stated, computed in zip(("min", "max"), (low, high), _range(encoding), strict=True):
        off = ~(
            np.abs(stated - computed) <= 0.5 * encoding.scale.reshape(-1) + 1e-5 * np.abs(computed)
        )
        if off.any():
            i = int(off.argmax())
            report.error(
                key,
                f"is {stated[i]} in item {i}, but scale and offset make it {computed[i]}",
            )


def _shift_of(value: Any) -> float:
    if type(value) not in (int, float) or value not in (0, 0.5):
        raise FieldError("is not 0 or 0.5, the only shifts there are")
    return float(value)


def build_0_6_1(encoding: Encoding) -> list[dict[str, Any]]:
    """The items under the encoding's name."""
    assert not isinstance(encoding, LpbqEncoding), "0.6.1 has no LPBQ; convert leaves none"
    if isinstance(encoding, FloatEncoding):
        return [{"bitwidth": encoding.bitwidth, "dtype": "float"}]
    shared = {
        "bitwidth": encoding.bitwidth,
        "dtype": "int",
        "is_symmetric": str(encoding.symmetric),
    }
    if encoding.zero_point_shift:
        shared["zero_point_shift"] = encoding.zero_point_shift
    columns = (*_range(encoding), encoding.scale.reshape(-1), encoding.offset.reshape(-1))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [
        {"min": low, "max": high, "scale": scale, "offset": offset, **shared}
        for low, high, scale, offset in rows
    ]


def _range(encoding: IntegerEncoding) -> tuple[Floats, Floats]:
    """Lowest and highest value of each grid; in float32 if the scales are, which is AIMET's way."""
    offset, scale = encoding.offset.reshape(-1), encoding.scale.reshape(-1)
    highest = offset + 2**encoding.bitwidth - 1
    with np.errstate(over="ignore", under="ignore"):
        narrow = scale.astype(np.float32)
        if (narrow == scale).all():
            low, high = (steps.astype(np.float32) * narrow for steps in (offset, highest))
            if np.isfinite(low).all() and np.isfinite(high).all():
                return low.astype(np.float64), high.astype(np.float64)
    return offset * scale, highest * scale


def parse_1_0_0(record: Record) -> Encoding | None:
    """The entry's encoding; None, with a finding, if it is malformed."""
    name = record.text("name")
    bitwidth = record.bitwidth("bw")
    dtype = record.text("dtype", ("INT", "FLOAT"))
    if record.values.get("enc_type") == "VECTOR":
        record.error("enc_type", _REFUSED)
        return None
    kinds = (
        ("PER_TENSOR",) if dtype == "FLOAT" else ("PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ")
    )
    kind = record.text("enc_type", kinds)
    if name is None or bitwidth is None or dtype is None or kind is None:
        return None
    if dtype == "FLOAT":
        record.close()
        return FloatEncoding(name, bitwidth)
    return (
        _parse_lpbq(name, bitwidth, record)
        if kind == "LPBQ"
        else _parse_integer(name, bitwidth, kind, record)
    )


def _parse_integer(name: str, bitwidth: int, kind: str, record: Record) -> Encoding | None:
    symmetric, scale, offset = (
        record.boolean("is_sym"),
        record.scales("scale"),
        record.integers("offset"),
    )
    record.flat("scale", scale)
    record.flat("offset", offset)
    block_size = record.integer("block_size", 1) if kind == "PER_BLOCK" else None
    shift = _shifts(record, scale) if record.has("zero_point_shift") else 0.0
    record.close()
    if (
        scale is None
        or offset is None
        or symmetric is None
        or shift is None
        or scale.ndim != 1
        or offset.ndim != 1
    ):
        return None
    if scale.shape != offset.shape:
        record.error("offset", f"has {offset.size} values, but scale has {scale.size}")
        return None
    if kind == "PER_TENSOR":
        if scale.size != 1:
            record.error("scale", f"has {scale.size} values; PER_TENSOR has one")
            return None
        scale, offset = scale.reshape(()), offset.reshape(())
    elif kind == "PER_BLOCK" and block_size is None:
        return None
    return IntegerEncoding(
        name, bitwidth, scale, offset, symmetric, block_size=block_size, zero_point_shift=shift
    )


def _shifts(record: Record, scale: Floats | None) -> float | None:
    values = record.value("zero_point_shift")
    if (
        not isinstance(values, list)
        or not values
        or not all_equal(values)
        or (scale is not None and len(values) != scale.size)
    ):
        record.error("zero_point_shift", "must be a list as long as scale, of equal values")
        return None
    try:
        return _shift_of(values[0])
    except FieldError as error:
        record.error("zero_point_shift", str(error))
        return None


def _parse_lpbq(name: str, decompressed: int, record: Record) -> Encoding | None:
    bitwidth, block_size = record.bitwidth("compressed_bw"), record.integer("block_size", 1)
    scale, offset, block_scale = (
        record.scales("scale"),
        record.integers("offset"),
        record.integers("per_block_int_scale", 1),
    )
    if record.boolean("is_sym") is False:
        record.error("is_sym", "is false; LPBQ is symmetric")
    for key, array in (("scale", scale), ("offset", offset), ("per_block_int_scale", block_scale)):
        record.flat(key, array)
    record.close()
    if (
        bitwidth is None
        or block_size is None
        or scale is None
        or offset is None
        or block_scale is None
    ):
        return None
    if bitwidth > decompressed:
        record.error("compressed_bw", f"is {bitwidth}, more than bw, {decompressed}")
        return None
    if offset.shape != scale.shape or (offset != -(2 ** (decompressed - 1))).any():
        record.error(
            "offset",
            f"must be {-(2 ** (decompressed - 1))} for each of the {scale.size} scales: LPBQ is "
            "symmetric",
        )
    if block_scale.size % scale.size:
        record.error(
            "per_block_int_scale",
            f"has {block_scale.size} values, which {scale.size} channels cannot share evenly",
        )
    if block_scale.max() > 2 ** (decompressed - bitwidth):
        record.error(
            "per_block_int_scale",
            f"reaches {block_scale.max()}; with {bitwidth} of {decompressed} bits it ends at "
            f"{2 ** (decompressed - bitwidth)}",
        )
    return LpbqEncoding(
        name, bitwidth, block_size, block_scale, scale, decompressed_bitwidth=decompressed
    )


def build_1_0_0(encoding: Encoding) -> dict[str, Any]:
    """The encoding's entry."""
    if isinstance(encoding, FloatEncoding):
        return {
            "name": encoding.name,
            "dtype": "FLOAT",
            "bw": encoding.bitwidth,
            "enc_type": "PER_TENSOR",
        }
    if isinstance(encoding, LpbqEncoding):
        decompressed = encoding.decompressed_bitwidth
        assert decompressed is not None, "convert requires it"
        scale = encoding.channel_scale.reshape(-1).tolist()
        entry: dict[str, Any] = {
            "name": encoding.name,
            "dtype": "INT",
            "bw": decompressed,
            "is_sym": True,
            "enc_type": "LPBQ",
            "scale": scale,
        }
        entry |= {
            "offset": [-(2 ** (decompressed - 1))] * len(scale),
            "block_size": encoding.block_size,
            "compressed_bw": encoding.bitwidth,
        }
        return entry | {"per_block_int_scale": encoding.block_scale.reshape(-1).tolist()}
    entry = {
        "name": encoding.name,
        "dtype": "INT",
        "bw": encoding.bitwidth,
        "is_sym": encoding.symmetric,
    }
    entry |= {
        "enc_type": f"PER_{encoding.granularity.upper()}",
        "scale": encoding.scale.reshape(-1).tolist(),
    }
    entry["offset"] = encoding.offset.reshape(-1).tolist()
    if encoding.block_size is not None:
        entry["block_size"] = encoding.block_size
    if encoding.zero_point_shift:
        entry["zero_point_shift"] = [encoding.zero_point_shift] * encoding.scale.size
    return entry
