"""Base class and shared field types of all recipe sections."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base class of recipe sections. Immutable; rejects unknown keys, `.nan` and `.inf`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
