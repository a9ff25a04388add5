"""The state of an unfinished tuning in a file: a killed call resumes from it and ends with the same
bits.

Only the same call finds the state: its key is a digest of everything that the result depends on. A
damaged file is ignored. The state is written by the clock, because a step may take a second or an
hour: every minute, or after twenty times as long as writing takes. Its size is three float32
numbers per tuned number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from qwlora.atomic import read_tensors, write_tensors
from qwlora.nn.fingerprint import update_digest

_SECONDS_BETWEEN, _TIMES_WRITING = 60.0, 20


class TuningState:
    """The file; without a folder nothing is stored.

    Args:
        made_from: what the key is a digest of.
    """

    def __init__(self, folder: Path | None, made_from: Iterable[Any]):
        self._file, self._key = None if folder is None else folder / "tuning.safetensors", ""
        if folder is not None:
            update_digest(digest := hashlib.sha256(), made_from)
            self._key = digest.hexdigest()
        self._due = monotonic() + _SECONDS_BETWEEN

    def read(self) -> dict[str, Tensor] | None:
        """The state that the same call stored; None if it must start from the beginning."""
        if self._file is None:
            return None
        try:
            tensors, metadata = read_tensors(self._file)
        except (FileNotFoundError, SafetensorError, ValueError):
            return None
        return tensors if metadata.get("key") == self._key else None

    def write(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Store the result of `state` if it is time to."""
        if self._file is None or (began := monotonic()) < self._due:
            return
        write_tensors(self._file, state(), {"key": self._key})
        self._due = (now := monotonic()) + max(_SECONDS_BETWEEN, _TIMES_WRITING * (now - began))
