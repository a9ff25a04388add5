"""The JSON of encodings files. The `content` of each version's `Document` turns JSON into an
`EncodingsFile`; `sections_of` turns entries into JSON.

Versions 0.6.1 and 1.0.0: activations and parameters in two sections, no axis, flat lists.

    {version, producer, activation_encodings, param_encodings, excluded_layers, quantizer_args}

In 0.6.1 a section is an object. Under each name is a list with one item per channel, or one for
floats; there are no blocks:

    {min, max, scale, offset, bitwidth, dtype: "int", is_symmetric: "True" | "False"
    [, zero_point_shift]}
    {bitwidth, dtype: "float"}

`min = offset * scale` and `max = (offset + 2^bitwidth - 1) * scale` are redundant. In 1.0.0 a
section is a list of entries:

    {name, dtype: "INT", bw, is_sym, enc_type: PER_TENSOR | PER_CHANNEL | PER_BLOCK, scale, offset
    [, block_size][, zero_point_shift]}
    {name, dtype: "INT", bw, compressed_bw, is_sym: true, enc_type: LPBQ, scale, offset, block_size,
    per_block_int_scale}
    {name, dtype: "FLOAT", bw, enc_type: PER_TENSOR}

Versions 2.0.0 and 2.1.0: one list of encodings, axes, signed or unsigned codes, nested scales.

    {version, producer, encodings: [...]}

Entries:

    integers        {name, output_dtype: "int8" | "uint16" | ..., y_scale[, y_zero_point][, axis]
                    [, block_size]};  real = (q - y_zero_point) * y_scale
    floats          {name, output_dtype: "float8e4m3fn" | ..., y_scale[, axis][, block_size]}
    LPBQ in 2.0.0   {name, output_dtype, per_block_int_scale, per_channel_float_scale, axis,
                    block_size}
    LPBQ in 2.1.0   {name, output_dtype, y_scale: {x, x_scale, axis}, axis, block_size}

`axis` is the channel axis, or the block axis if there is a `block_size`. A `y_zero_point` that is
zero everywhere is omitted; one that ends in .5 is a `zero_point_shift`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    PlainValidator,
    Tag,
    ValidationError,
    model_validator,
)

from qwlora.errors import EncodingsFileError, expected, shortened
from qwlora.formats.aimet_encodings.model import (
    FLOAT_FORMATS,
    MAX_BITWIDTH,
    EncodingsFile,
    Entry,
    FloatEncoding,
    Floats,
    IntegerEncoding,
    Integers,
    LpbqEncoding,
)

MAX_RANK = 8
# Larger than any code or offset, and far below the end of int64: sums cannot overflow.
MAX_INTEGER = 2**40
# In pydantic's paths of errors, not in files.
_KINDS = {"plain", "nested"}


def numbers_of(value: Any) -> Floats:
    """Finite numbers: one, a list, or nested lists of equal lengths."""
    try:
        numbers: Floats = _rectangle(value, "numbers").astype(np.float64)
    except OverflowError:
        raise ValueError("contains an integer that is too large for a float") from None
    bad = ~np.isfinite(numbers)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {numbers.size} values are not finite, the first is "
            f"{numbers[bad][0]}"
        )
    return numbers


def integers_of(value: Any) -> Integers:
    """As `numbers_of`, integers of at most `MAX_INTEGER`; aimet-onnx writes -128 as -128.0."""
    integers = _rectangle(value, "integers")
    if wrong := [item for item in integers.flat if item % 1]:
        raise ValueError(f"contains {describe(wrong[0])}; integers are needed")
    for extreme in (integers.min(), integers.max()):
        if abs(extreme) > MAX_INTEGER:
            raise ValueError(f"contains {describe(extreme)}; the limit is {MAX_INTEGER}")
    return integers.astype(np.int64)


def _rectangle(value: Any, what: str) -> npt.NDArray[Any]:
    # dtype object: numpy then keeps integers exact, and lists of different lengths as values.
    array = np.array(value, dtype=object)
    if not array.size:
        raise ValueError("is empty")
    if wrong := [item for item in array.flat if type(item) not in (int, float)]:
        raise ValueError(f"contains {describe(wrong[0])}; {what} in lists of one length are needed")
    return array


def _flat(array: Any) -> Any:
    if array.ndim != 1:
        raise ValueError(f"has {array.ndim} axes; this version has one flat list")
    return array


Name = Annotated[str, Field(min_length=1)]
NestedNumbers = Annotated[Any, PlainValidator(numbers_of)]
NestedIntegers = Annotated[Any, PlainValidator(integers_of)]
FlatNumbers = Annotated[NestedNumbers, AfterValidator(_flat)]
FlatIntegers = Annotated[NestedIntegers, AfterValidator(_flat)]


class Strict(BaseModel):
    """A JSON object with exactly these fields, of exactly these types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class JsonEntry(Strict):
    """The fields of an entry as a version has them. A subclass has `entry()`, which raises
    ValueError if they contradict one another; a document holds its result."""

    name: Name

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            scale = fields.get("y_scale")
            if fields.get("enc_type") == "VECTOR" or "vector_dim" in fields:
                raise ValueError(
                    "is vector quantization (VECTOR, of GPTVQ): its codes index a codebook, they "
                    "are not integers on a grid. Quantize the layer per channel, per block or LPBQ"
                )
            if isinstance(scale, dict) and "input_dtype" in scale:
                raise ValueError(
                    "is NVFP4: 4-bit floats, whose scales are floats too. Quantize the layer to "
                    "integers"
                )
        return fields

    def check_fields(self, needed: Collection[str], optional: Collection[str] = ()) -> None:
        """Refuse an entry without the fields of its kind, or with others."""
        stored = self.model_fields_set - {"name"}
        problems = [f"{key} is missing" for key in sorted({*needed} - stored)]
        problems += [
            f"{key} is not a field of this kind of entry"
            for key in sorted(stored - {*needed, *optional})
        ]
        if problems:
            raise EncodingsFileError(self.name, problems)


AsEntry = AfterValidator(lambda fields: fields.entry())


class Document(Strict):
    """A file of one version. A subclass has `content()`, the values."""

    version: str
    # `block_order` is in our own files only.
    producer: dict[Literal["package", "version", "block_order"], Name] | None = None


def problem_line(where: str, field: str, message: str) -> str:
    """One line for a problem: the encoding or section, its field if there is one, the message."""
    return f"{printable(where)}{f', {printable(field)}' if field else ''}: {message}"


def problem_lines(error: ValidationError, document: dict[str, Any]) -> Iterator[str]:
    """The problems that pydantic found in `document`, by entry and field."""
    for problem in error.errors(include_url=False):
        where, keys = "file", problem["loc"]
        if len(keys) > 1 and isinstance(index := keys[1], int):
            # In 0.6.1 the entries of a section are the values of an object, named by their keys.
            entry = list(document[str(keys[0])])[index]
            name = entry.get("name") if isinstance(entry, dict) else entry
            where = name or "''" if isinstance(name, str) else f"{keys[0]}[{index}]"
            keys = keys[2:]
        field = ".".join(
            f"item {key}" if isinstance(key, int) else key for key in keys if key not in _KINDS
        )
        for message in _messages(dict(problem)):
            yield problem_line(where, field, message)


def _messages(problem: dict[str, Any]) -> tuple[str, ...]:
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        return ("is missing",)
    if kind == "extra_forbidden":
        return ("is not a field of this entry in this version",)
    if kind == "value_error":
        reason = problem["ctx"]["error"]
        return reason.problems if isinstance(reason, EncodingsFileError) else (str(reason),)
    return (f"is {describe(value)}; it must be {expected(problem)}",)


def printable(text: str, most: int = 120) -> str:
    """Untrusted text on one line, escaped, truncated after `most` characters."""
    return shortened(text if text.isprintable() else repr(text), most)


def describe(value: Any) -> str:
    """An untrusted JSON value on one short line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return printable(repr(value))


# Versions 0.6.1 and 1.0.0

Section = TypeVar("Section")


def is_by_module(document: dict[str, Any]) -> bool:
    """Whether the activations of a document are listed by module."""
    # aimet-torch writes this form for loading it again: `sim.save_encodings_to_json` (no version),
    # `*_torch.encodings` of `sim.export` (labeled 0.6.1 or 1.0.0; the items are those of 0.6.1),
    # and the parameters alone after AdaRound and GPTVQ (no activations, no version):
    #
    #     activation_encodings: {MODULE: {input: {"0": ITEM or [ITEM, ...]}, output: {...}}}
    #     param_encodings: {MODULE.NAME: [ITEM, ...]}
    version, activations = document.get("version"), document.get("activation_encodings", {})
    if not isinstance(document.get("param_encodings"), dict) or not isinstance(activations, dict):
        return False
    is_nested = any(isinstance(value, dict) for value in activations.values())
    return "version" not in document or version == "1.0.0" or (version == "0.6.1" and is_nested)


def without_modules(document: dict[str, Any]) -> dict[str, Any]:
    """Convert a document by module to 0.6.1, with activations MODULE.input.0 and so on."""
    activations = {}
    for module, sides in document.get("activation_encodings", {}).items():
        is_nested = isinstance(sides, dict) and all(isinstance(v, dict) for v in sides.values())
        if not is_nested or not sides.keys() <= {"input", "output"}:
            problem = f"is {describe(sides)}; a module has objects input and output here"
            raise EncodingsFileError(module, [problem])
        for side, values in sides.items():
            for index, items in values.items():
                entry = items if isinstance(items, list) else [items]
                activations[f"{module}.{side}.{index}"] = entry
    implied = {"producer": {"package": "aimet-torch"}}
    return implied | document | {"version": "0.6.1", "activation_encodings": activations}


class SectionsDocument(Document, Generic[Section]):
    """0.6.1 and 1.0.0, by the JSON of a section."""

    activation_encodings: Section
    param_encodings: Section
    excluded_layers: list[Name] | None = None
    quantizer_args: dict[str, JsonValue] | None = None

    def content(self) -> EncodingsFile:
        activations, parameters = cast(Any, (self.activation_encodings, self.param_encodings))
        return EncodingsFile(
            self.version,
            (*activations, *parameters),
            frozenset(entry.name for entry in parameters),
            None if self.excluded_layers is None else tuple(self.excluded_layers),
            self.quantizer_args,
            self.producer,  # type: ignore[arg-type]
        )


class Entry061(JsonEntry):
    """A name, and its items by field: one number per channel, and the fields all channels share."""

    dtype: Literal["int", "float"]
    bitwidth: int
    is_symmetric: Literal["True", "False"] = "False"
    zero_point_shift: float = 0.0
    scale: FlatNumbers = None
    offset: FlatIntegers = None
    min: FlatNumbers = None
    max: FlatNumbers = None

    def entry(self) -> Entry:
        if self.dtype == "float":
            self.check_fields({"dtype", "bitwidth"})
            return FloatEncoding(self.name, self.bitwidth)
        numbers = {"scale", "offset", "min", "max"}
        self.check_fields({"dtype", "bitwidth", "is_symmetric", *numbers}, {"zero_point_shift"})
        shape = () if self.scale.size == 1 else (-1,)
        encoding = IntegerEncoding(
            self.name,
            self.bitwidth,
            self.scale.reshape(shape),
            self.offset.reshape(shape),
            self.is_symmetric == "True",
            zero_point_shift=self.zero_point_shift,
        )
        for key, computed in zip(("min", "max"), _range(encoding), strict=True):
            stated = getattr(self, key)
            # Half a step more would be another grid; less is rounding.
            tolerance = 0.5 * self.scale + 1e-5 * np.abs(computed)
            off = ~(np.abs(stated - computed) <= tolerance)
            if off.any():
                i = int(off.argmax())
                raise ValueError(
                    f"{key} is {stated[i]} in item {i}, but scale and offset make it {computed[i]}"
                )
        return encoding


def _by_field(section: Any) -> list[dict[str, Any]]:
    if not isinstance(section, dict):
        raise ValueError(f"is {describe(section)}; an object is needed")
    entries = []
    for name, items in section.items():
        entry = {"name": name, "items": items}
        if isinstance(items, list) and all(isinstance(item, dict) for item in items):
            keys = dict.fromkeys(key for item in items for key in item)
            fields: dict[str, Any] = dict.fromkeys(keys)
            # Only known fields become columns: a hostile file, each of whose items has other keys,
            # would make a table of quadratic size.
            for key in keys & Entry061.model_fields.keys():
                fields[key] = [item.get(key) for item in items]
            for key in {"dtype", "bitwidth", "is_symmetric", "zero_point_shift"} & fields.keys():
                if all(value == fields[key][0] for value in fields[key]):
                    fields[key] = fields[key][0]
            entry = {"name": name, **fields}
        entries.append(entry)
    return entries


Section061 = Annotated[list[Annotated[Entry061, AsEntry]], BeforeValidator(_by_field)]


def _items(encoding: Entry) -> list[dict[str, Any]]:
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
    # In float32 if the scales are, as in AIMET, so that its files are written back as they were.
    offset, scale = encoding.offset.reshape(-1), encoding.scale.reshape(-1)
    highest = offset + 2**encoding.bitwidth - 1
    with np.errstate(over="ignore", under="ignore"):
        narrow = scale.astype(np.float32)
        if (narrow == scale).all():
            low, high = (steps.astype(np.float32) * narrow for steps in (offset, highest))
            if np.isfinite(low).all() and np.isfinite(high).all():
                return low.astype(np.float64), high.astype(np.float64)
    return offset * scale, highest * scale


_GRID = {"is_sym", "scale", "offset"}
_FIELDS = {
    "PER_TENSOR": _GRID,
    "PER_CHANNEL": _GRID,
    "PER_BLOCK": {*_GRID, "block_size"},
    "LPBQ": {*_GRID, "block_size", "compressed_bw", "per_block_int_scale"},
}


class Entry100(JsonEntry):
    """An entry of any kind; `_FIELDS` has the fields of each."""

    dtype: Literal["INT", "FLOAT"]
    bw: int
    enc_type: Literal["PER_TENSOR", "PER_CHANNEL", "PER_BLOCK", "LPBQ"]
    is_sym: bool = False
    scale: FlatNumbers = None
    offset: FlatIntegers = None
    zero_point_shift: FlatNumbers = None
    block_size: int | None = None
    compressed_bw: int = 0
    per_block_int_scale: FlatIntegers = None

    def entry(self) -> Entry:
        always, scale, offset = {"dtype", "bw", "enc_type"}, self.scale, self.offset
        if self.dtype == "FLOAT":
            self.check_fields(always)
            return FloatEncoding(self.name, self.bw)
        optional = set() if self.enc_type == "LPBQ" else {"zero_point_shift"}
        self.check_fields(always | _FIELDS[self.enc_type], optional)
        if scale.size != offset.size:
            raise ValueError(f"offset has {offset.size} values, but scale has {scale.size}")
        if self.enc_type == "LPBQ":
            center = -(2 ** (self.bw - 1))
            if not self.is_sym or (offset != center).any():
                raise ValueError(f"LPBQ is symmetric: is_sym is true, and each offset {center}")
            blocks, size = self.per_block_int_scale, self.block_size or 0
            return LpbqEncoding(self.name, self.compressed_bw, size, blocks, scale, self.bw)
        if self.enc_type == "PER_TENSOR":
            if scale.size != 1:
                raise ValueError(f"scale has {scale.size} values; PER_TENSOR has one")
            scale, offset = scale.reshape(()), offset.reshape(())
        shift = np.zeros(scale.shape) if self.zero_point_shift is None else self.zero_point_shift
        if shift.size != scale.size or (shift != shift.flat[0]).any():
            raise ValueError("zero_point_shift must be a list as long as scale, of equal values")
        return IntegerEncoding(
            self.name,
            self.bw,
            scale,
            offset,
            self.is_sym,
            block_size=self.block_size,
            zero_point_shift=float(shift.flat[0]),
        )


Section100 = list[Annotated[Entry100, AsEntry]]


def json_of(encoding: Entry) -> dict[str, Any]:
    """The JSON of an entry of 1.0.0."""
    entry = {"name": encoding.name, "dtype": "INT", "bw": encoding.bitwidth}
    if isinstance(encoding, FloatEncoding):
        return entry | {"dtype": "FLOAT", "enc_type": "PER_TENSOR"}
    if isinstance(encoding, LpbqEncoding):
        decompressed = encoding.decompressed_bitwidth
        assert decompressed is not None, "convert requires it"
        return entry | {
            "bw": decompressed,
            "is_sym": True,
            "enc_type": "LPBQ",
            "scale": encoding.channel_scale.tolist(),
            "offset": [-(2 ** (decompressed - 1))] * encoding.channel_scale.size,
            "block_size": encoding.block_size,
            "compressed_bw": encoding.bitwidth,
            "per_block_int_scale": encoding.block_scale.tolist(),
        }
    entry |= {
        "is_sym": encoding.symmetric,
        "enc_type": f"PER_{encoding.granularity.upper()}",
        "scale": encoding.scale.reshape(-1).tolist(),
        "offset": encoding.offset.reshape(-1).tolist(),
    }
    if encoding.block_size is not None:
        entry["block_size"] = encoding.block_size
    if encoding.zero_point_shift:
        entry["zero_point_shift"] = [encoding.zero_point_shift] * encoding.scale.size
    return entry


# Versions 2.0.0 and 2.1.0

Axis = Annotated[int, Field(ge=-MAX_RANK, lt=MAX_RANK)]


def _known_dtype(dtype: str) -> str:
    integer = re.fullmatch("u?int([1-9][0-9]?)", dtype)
    if dtype not in FLOAT_FORMATS and (integer is None or int(integer[1]) > MAX_BITWIDTH):
        raise ValueError(
            f"is {printable(dtype, 40)!r}; int1 to int32, uint1 to uint32 or one of "
            f"{', '.join(FLOAT_FORMATS)} is needed"
        )
    return dtype


class NestedScale(Strict):
    """An integer scale per block with a float scale per channel."""

    x: NestedIntegers
    x_scale: FlatNumbers
    axis: Axis


class Entry2(JsonEntry):
    """An entry of either version."""

    output_dtype: Annotated[str, AfterValidator(_known_dtype)]
    axis: Axis | None = None
    block_size: int | None = None
    y_zero_point: NestedNumbers = None
    y_scale: Annotated[
        Annotated[NestedNumbers, Tag("plain")] | Annotated[NestedScale, Tag("nested")],
        Discriminator(lambda value: "nested" if isinstance(value, dict) else "plain"),
    ] = None
    per_block_int_scale: NestedIntegers = None
    per_channel_float_scale: NestedNumbers = None

    def entry(self) -> Entry:
        if isinstance(self.y_scale, NestedScale):
            self.check_fields({"output_dtype", "axis", "block_size", "y_scale"})
            blocks, channels = self.y_scale.x, self.y_scale.x_scale
            channel = _positive(self.y_scale.axis, blocks.ndim, "y_scale.axis")
            if channels.size != blocks.shape[channel]:
                raise ValueError(
                    f"y_scale.x_scale has {channels.size} values, but axis {self.y_scale.axis} of "
                    f"x has {blocks.shape[channel]}"
                )
            shape = [-1 if axis == channel else 1 for axis in range(blocks.ndim)]
            return self._lpbq(blocks, channels.reshape(shape))
        if self.per_block_int_scale is not None:
            scales = {"per_block_int_scale", "per_channel_float_scale"}
            self.check_fields({"output_dtype", "axis", "block_size", *scales})
            return self._lpbq(self.per_block_int_scale, self.per_channel_float_scale)
        self.check_fields({"output_dtype", "y_scale"}, {"axis", "block_size", "y_zero_point"})
        scale, axis, size, dtype = self.y_scale, self.axis, self.block_size, self.output_dtype
        if scale.ndim and axis is None:
            raise ValueError("axis is missing; a y_scale that is a list needs one")
        if axis is not None and size is not None:
            axis = _positive(axis, scale.ndim)
        if dtype in FLOAT_FORMATS:
            if self.y_zero_point is not None:
                raise ValueError("y_zero_point is not a field of floats")
            return FloatEncoding(self.name, FLOAT_FORMATS[dtype], dtype, scale, axis, size)
        signed, bitwidth = _integer_format(dtype)
        center = -(2 ** (bitwidth - 1))
        zero_point = np.zeros(scale.shape) if self.y_zero_point is None else self.y_zero_point
        whole = np.ceil(zero_point)
        shifts = {*(whole - zero_point).reshape(-1).tolist()}
        if shifts not in ({0.0}, {0.5}) or np.abs(whole).max() > MAX_INTEGER:
            raise ValueError(
                f"y_zero_point must hold integers within {MAX_INTEGER}, or integers and a half"
            )
        if zero_point.shape != scale.shape:
            raise ValueError(
                f"y_zero_point has shape {list(zero_point.shape)}, but y_scale {list(scale.shape)}"
            )
        offset = (center if signed else 0) - whole.astype(np.int64)
        symmetric, shift = bool((offset == center).all()), shifts.pop()
        return IntegerEncoding(
            self.name, bitwidth, scale, offset, symmetric, signed, axis, size, shift
        )

    def _lpbq(self, blocks: Integers, channels: Floats) -> Entry:
        signed, bitwidth = _integer_format(self.output_dtype)
        if not signed:
            raise ValueError("output_dtype must be int1 to int32: LPBQ is signed and symmetric")
        axis, size = _positive(self.axis or 0, blocks.ndim), self.block_size or 0
        return LpbqEncoding(self.name, bitwidth, size, blocks, channels, axis=axis)


class Document2(Document):
    """A file of version 2.0.0 or 2.1.0."""

    version: Literal["2.0.0", "2.1.0"]
    encodings: list[Annotated[Entry2, AsEntry]]

    def content(self) -> EncodingsFile:
        entries: Any = self.encodings
        return EncodingsFile(self.version, tuple(entries), producer=self.producer)  # type: ignore[arg-type]


def _integer_format(dtype: str) -> tuple[bool, int]:
    """(signed, bitwidth) of int8, uint4 ...; floats count as unsigned."""
    return dtype.startswith("int"), int(re.sub(r"\D+", "", dtype)[:2])


def _positive(axis: int, rank: int, field: str = "axis") -> int:
    # AIMET 2.42 writes -1 for some axes of nested scales, next to a positive axis.
    if not -rank <= axis < rank:
        raise ValueError(f"{field} is {axis}, outside scales of {rank} axes")
    return axis % rank


def _json_of_2(encoding: Entry, version: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": encoding.name}
    if isinstance(encoding, LpbqEncoding):
        blocks, channels = encoding.block_scale.tolist(), encoding.channel_scale
        entry["output_dtype"] = f"int{encoding.bitwidth}"
        if version == "2.0.0":
            entry["per_block_int_scale"] = blocks
            entry["per_channel_float_scale"] = channels.tolist()
        else:
            flat, axis = channels.reshape(-1).tolist(), encoding.channel_axis
            entry["y_scale"] = {"x": blocks, "x_scale": flat, "axis": axis}
    else:
        assert encoding.scale is not None, "convert drops floats without a scale"
        scale = {"y_scale": encoding.scale.tolist()}
        if isinstance(encoding, FloatEncoding):
            entry |= {"output_dtype": encoding.format, **scale}
        else:
            sign = "" if encoding.signed else "u"
            entry |= {"output_dtype": f"{sign}int{encoding.bitwidth}", **scale}
            zero_point: Any = (encoding.center if encoding.signed else 0) - encoding.offset
            zero_point = zero_point - (encoding.zero_point_shift or 0)
            if zero_point.any():
                entry["y_zero_point"] = zero_point.tolist()
    entry |= {} if encoding.axis is None else {"axis": encoding.axis}
    return entry | ({} if encoding.block_size is None else {"block_size": encoding.block_size})


def sections_of(file: EncodingsFile) -> dict[str, Any]:
    """The JSON of the entries of a file, which its version can express."""
    if file.parameters is None:
        return {"encodings": [_json_of_2(entry, file.version) for entry in file.encodings]}
    parameters = [entry for entry in file.encodings if entry.name in file.parameters]
    activations = [entry for entry in file.encodings if entry.name not in file.parameters]
    sections = {"activation_encodings": activations, "param_encodings": parameters}
    if file.version == "0.6.1":
        return {key: {e.name: _items(e) for e in entries} for key, entries in sections.items()}
    return {key: [json_of(e) for e in entries] for key, entries in sections.items()}
