"""JSON as RFC 8259 defines it: without the `NaN` and `Infinity` that Python's `json` writes, and
without the repeated keys that it reads, of which it keeps the last."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwlora.errors import NonFiniteError, SourceError, described, shortened
from qwlora.system.regular_files import check_readable


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json.loads`: ValueError if a key occurs twice in one object."""
    values = dict(pairs)
    if len(values) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"has the key {shortened(repr(name), 100)} twice in one object")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; SourceError if the file is none, or a key occurs twice."""
    check_readable(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=distinct_keys)
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{str(path)!r} cannot be read: {described(error)}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{str(path)!r} is not a JSON object")
    return content


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON text; NonFiniteError names the path of a number that is NaN or infinite."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        path, number = next(_non_finite(value), ("", None))
        if number is None:
            raise
        raise NonFiniteError(
            f"{path or 'the value'} is {number}, which JSON cannot hold. Nothing was written; "
            "look for the step that computed it"
        ) from error


def _non_finite(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _non_finite(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _non_finite(part, f"{path}[{index}]")
