"""JSON as RFC 8259 defines it: without the `NaN` and `Infinity` that Python's `json` writes."""

from __future__ import annotations

import json
import math
from typing import Any

from qwlora.errors import NonFiniteError


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text.

    Raises:
        NonFiniteError: a number is NaN or infinite; its path is named.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        found = _non_finite(value, "")
        if found is None:
            raise
        path, number = found
        raise NonFiniteError(
            f"{path or 'the value'} is {number}, which JSON cannot hold. Nothing was written; "
            "look for the step that computed it"
        ) from error


def _non_finite(value: Any, path: str) -> tuple[str, float] | None:
    """The first number without a value in JSON, and its path."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (path, value)
    if isinstance(value, dict):
        parts = [(f"{path}.{key}" if path else str(key), part) for key, part in value.items()]
    elif isinstance(value, list | tuple):
        parts = [(f"{path}[{index}]", part) for index, part in enumerate(value)]
    else:
        return None
    return next((found for where, part in parts if (found := _non_finite(part, where))), None)
