"""JSON as RFC 8259 defines it: without the `NaN` and `Infinity` that Python's `json` writes, and
without the repeated keys that it reads."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from qwlora.errors import NonFiniteError, SourceError, shortened


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`.

    Raises:
        ValueError: a key occurs twice in one object.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key {shortened(repr(name), 100)} twice in one object")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: the file cannot be read, is not a JSON object, or a key occurs twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"{str(path)!r} cannot be read: {error or type(error).__name__}"
        ) from error
    if not isinstance(content, dict):
        raise SourceError(f"{str(path)!r} is not a JSON object")
    return content


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
