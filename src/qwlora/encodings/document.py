"""What the documents of all versions share: the fields of the file, and the two sections of 0.6.1
and 1.0.0. One module per version has a `Document` with its entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any, Literal, Self

from pydantic import PlainValidator, model_validator

from qwlora.encodings.findings import describe, printable
from qwlora.encodings.json_arrays import Name, Strict
from qwlora.encodings.model import EncodingsFile, Entry
from qwlora.errors import EncodingsFileError


class EntryOfFile(Strict):
    """The fields of an entry as a version has them."""

    name: Name
    _entry: Entry | None = None

    @abstractmethod
    def entry(self) -> Entry:
        """The entry.

        Raises:
            ValueError: its fields contradict one another.
        """

    def check_fields(self, needed: set[str], optional: set[str] = frozenset()) -> None:  # type: ignore[assignment]
        """Refuse an entry without the fields of its kind, or with others.

        Raises:
            EncodingsFileError: lists them.
        """
        stored = self.model_fields_set - {"name"}
        problems = [f"{key} is missing" for key in sorted(needed - stored)]
        problems += [
            f"{key} is not a field of this kind of entry"
            for key in sorted(stored - needed - optional)
        ]
        if problems:
            raise EncodingsFileError(self.name, problems)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._entry = self.entry()
        return self

    @property
    def value(self) -> Entry:
        """The checked entry."""
        assert self._entry is not None, "set by validation"
        return self._entry


class Document(Strict):
    """A file of one version."""

    version: str
    # `block_order` is in our own files only.
    producer: dict[Literal["package", "version", "block_order"], Name] | None = None

    @abstractmethod
    def content(self) -> EncodingsFile:
        """The values."""

    @classmethod
    @abstractmethod
    def sections_of(cls, file: EncodingsFile) -> dict[str, Any]:
        """The JSON of the entries of `file`, which the version can express."""


def _settings(value: Any) -> dict[str, Any]:
    """A flat object of plain values."""
    if not isinstance(value, dict):
        raise ValueError(f"is {describe(value)}; an object is needed")
    for key, setting in value.items():
        if not isinstance(setting, str | bool | int | float) or (
            isinstance(setting, float) and not isfinite(setting)
        ):
            raise ValueError(
                f"has {describe(setting)} under {printable(key)!r}; a string, a finite number, "
                "true or false is needed"
            )
    return value


class SectionsDocument(Document):
    """0.6.1 and 1.0.0."""

    activation_encodings: Sequence[EntryOfFile]
    param_encodings: Sequence[EntryOfFile]
    excluded_layers: list[Name] | None = None
    quantizer_args: Annotated[dict[str, Any] | None, PlainValidator(_settings)] = None

    def content(self) -> EncodingsFile:
        parameters = [entry.value for entry in self.param_encodings]
        return EncodingsFile(
            self.version,
            (*(entry.value for entry in self.activation_encodings), *parameters),
            frozenset(entry.name for entry in parameters),
            None if self.excluded_layers is None else tuple(self.excluded_layers),
            self.quantizer_args,
            self.producer,  # type: ignore[arg-type]
        )

    @classmethod
    def sections_of(cls, file: EncodingsFile) -> dict[str, Any]:
        parameters = file.parameters or frozenset()
        return {
            "activation_encodings": cls.section(
                [e for e in file.encodings if e.name not in parameters]
            ),
            "param_encodings": cls.section([e for e in file.encodings if e.name in parameters]),
        }

    @classmethod
    @abstractmethod
    def section(cls, encodings: list[Entry]) -> Any:
        """The JSON of some entries."""
