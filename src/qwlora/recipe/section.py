"""Base class and shared field types of all recipe sections."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from qwlora.errors import RecipeError, SourceError
from qwlora.formats.model_source import looked_for, user_path
from qwlora.system.parameter_names import NAME_PATTERN

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=100)]
Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]

# Whether paths and ids that a recipe names are checked. Those of a job may have been moved since.
# This is a context variable, since pydantic calls validators without arguments of ours.
_must_exist: ContextVar[bool] = ContextVar("must_exist", default=True)


@contextmanager
def of_a_job() -> Iterator[None]:
    """Texts and a model that a recipe names may be missing inside."""
    token = _must_exist.set(False)
    try:
        yield
    finally:
        _must_exist.reset(token)


class Section(BaseModel):
    """Base class of recipe sections. Immutable; rejects unknown keys, `.nan` and `.inf`.

    The docstring of a field is its description in `qwlora init --full` and docs/recipe.md.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    def problems(self) -> Iterator[str]:
        """Why valid keys of this section cannot work together, and what to change."""
        yield from ()

    @model_validator(mode="after")
    def _works_together(self) -> Self:
        if problems := list(self.problems()):
            raise RecipeError("", problems)
        return self


def located(text: str, check: Callable[[str], object]) -> str:
    """A path, hub id or module that `check` accepts, which raises SourceError."""
    path = user_path(text)
    if Path(text).exists() and not path.exists():
        raise SourceError(
            f"{text!r} is in the current directory, but paths in a recipe are relative to its own "
            f"folder{looked_for(text, path)}. Give {os.path.relpath(text, user_path('.'))}"
        )
    if _must_exist.get():
        check(text)
    if not path.exists():
        return text
    # Absolute, so that the recipe can be stored in the job, and with one spelling, so that a recipe
    # that was moved is of the same job. Without its `..`, a path through a link leads elsewhere.
    plain = os.path.abspath(path)
    is_same = os.path.exists(plain) and os.path.samefile(plain, path)
    return plain if is_same else str(path.absolute())


def file(wanted: str, read: Callable[[Path], object] = Path.exists) -> AfterValidator:
    """Validates the path of a file that `read` can read; `wanted` is for the message."""

    def check(text: str) -> None:
        path = user_path(text)
        if not path.is_file():
            problem = "is a folder" if path.is_dir() else f"does not exist{looked_for(text, path)}"
            raise SourceError(f"{text!r} {problem}. Give {wanted}")
        read(path)

    return AfterValidator(lambda text: located(text, check))
