"""What all sections of a recipe have in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the recipe; keys that it does not know are errors, and so are `.nan` and `.inf` for numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
