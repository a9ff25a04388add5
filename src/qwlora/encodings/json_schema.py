"""The JSON Schemas of the four versions (draft 2020-12), for editors and other people's programs.

A schema says what a field may hold. What relates fields to each other (lengths, offsets to bitwidths, ranges to scales, distinct names) is in the readers
alone, which check everything that the schemas do: a file that `read` takes is a file that its schema takes.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from qwlora.encodings.model import VERSIONS
from qwlora.errors import EncodingsFileError


def schema(version: str) -> dict[str, Any]:
    """The JSON Schema of one of `VERSIONS`.

    Raises:
        EncodingsFileError: there is no such version.
    """
    if version not in VERSIONS:
        raise EncodingsFileError(
            version, [f"no such encodings version; there are {', '.join(VERSIONS)}"]
        )
    return json.loads(
        resources.files("qwlora.encodings")
        .joinpath(f"schemas/{version}.json")
        .read_text(encoding="utf-8")
    )
