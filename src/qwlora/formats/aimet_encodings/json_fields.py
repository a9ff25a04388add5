"""What the JSON of all versions shares: arrays from nested lists, the fields of a file, and what is
wrong with them. The modules of the versions have a `Document` with its entries.

Time and memory are proportional to the file: nothing is broadcast or expanded, and arrays have at
most `MAX_RANK` axes. Untrusted text and values are shown on one short line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)

from qwlora.errors import EncodingsFileError
from qwlora.formats.aimet_encodings.model import Floats, Integers

MAX_RANK = 8
MAX_INTEGER = 2**40  # larger than any code or offset, far below the end of int64
_KINDS = {"plain", "nested"}  # in pydantic's paths, not in files


def numbers_of(value: Any) -> Floats:
    """Finite numbers: one, a list, or nested lists of equal lengths."""
    try:
        numbers: Floats = _rectangle(value, (int, float), "numbers").astype(np.float64)
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
    """Integers of at most `MAX_INTEGER`: one, a list, or nested lists of equal lengths."""
    integers = _rectangle(value, (int,), "integers")
    for extreme in (integers.min(), integers.max()):
        if abs(extreme) > MAX_INTEGER:
            raise ValueError(f"contains {describe(extreme)}; the limit is {MAX_INTEGER}")
    return integers.astype(np.int64)


def _rectangle(value: Any, kinds: Collection[type], what: str) -> npt.NDArray[Any]:
    """Nested lists as an array of Python's numbers."""
    array = np.array(value, dtype=object)  # lists of different lengths are kept as values
    if not array.size:
        raise ValueError("is empty")
    if wrong := [item for item in array.flat if type(item) not in kinds]:
        raise ValueError(f"contains {describe(wrong[0])}; {what} in lists of one length are needed")
    if array.ndim > MAX_RANK:
        raise ValueError(f"is nested deeper than {MAX_RANK} lists")
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
    """The fields of an entry as a version has them. A subclass has `entry()`, the entry, which
    raises ValueError if they contradict one another; a document holds the result."""

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
        """Refuse an entry without the fields of its kind, or with others.

        Raises:
            EncodingsFileError: lists them.
        """
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
    """A file of one version. A subclass has `content()`, the values, and `sections_of(file)`, the
    JSON of the entries of a file that the version can express."""

    version: str
    # `block_order` is in our own files only.
    producer: dict[Literal["package", "version", "block_order"], Name] | None = None


@dataclass(frozen=True)
class Finding:
    """One problem of a file.

    Args:
        severity: `error`: a runtime computes something else, or nothing; `warning`: legal, but
            unusual.
        where: name of the encoding, or the section of the file.
        field: of the encoding, or "".
    """

    severity: Literal["error", "warning"]
    where: str
    field: str
    message: str

    def __str__(self) -> str:
        place = printable(self.where) + (f", {printable(self.field)}" if self.field else "")
        return f"{place}: {self.message}"


def findings_of(error: ValidationError, document: dict[str, Any]) -> Iterator[Finding]:
    """The problems that pydantic found in `document`, by entry and field."""
    for problem in error.errors(include_url=False):
        section, *keys = problem["loc"]
        where = "file"
        if keys and isinstance(keys[0], int):
            # in 0.6.1 the entries of a section are the values of an object, named by their keys
            entry = list(document[str(section)])[keys[0]]
            name = entry.get("name") if isinstance(entry, dict) else entry
            where = name or "''" if isinstance(name, str) else f"{section}[{keys[0]}]"
            keys = keys[1:]
        else:
            keys = [section, *keys]
        field = ".".join(
            f"item {key}" if isinstance(key, int) else key for key in keys if key not in _KINDS
        )
        for message in _messages(dict(problem)):
            yield Finding("error", where, field, message)


def _messages(problem: dict[str, Any]) -> tuple[str, ...]:
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        return ("is missing",)
    if kind == "extra_forbidden":
        return ("is not a field of this entry in this version",)
    if kind == "value_error":
        reason = problem["ctx"]["error"]
        return reason.problems if isinstance(reason, EncodingsFileError) else (str(reason),)
    return (f"is {describe(value)}; {problem['msg'].replace('Input should', 'it must')}",)


def shared_lines(problems: Iterable[tuple[str, str]], what: str = "encodings") -> list[str]:
    """A line for each (name, problem); equal problems of more than three names share one."""
    names_of: dict[str, list[str]] = {}
    for name, problem in problems:
        names_of.setdefault(problem, []).append(printable(name))
    lines = []
    for problem, names in names_of.items():
        if len(names) <= 3:
            lines += [f"{name}: {problem}" for name in names]
        else:
            lines.append(f"{len(names)} {what} ({', '.join(names[:3])} ...): {problem}")
    return lines


def printable(text: str, most: int = 120) -> str:
    """Untrusted text on one line, escaped, truncated after `most` characters."""
    line = text if text.isprintable() else repr(text)
    return line if len(line) <= most else f"{line[:most]}..."


def describe(value: Any) -> str:
    """An untrusted JSON value on one short line."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    if type(value) is int and abs(value) >= 10**20:
        return f"an integer of {value.bit_length()} bits"
    return printable(repr(value))
