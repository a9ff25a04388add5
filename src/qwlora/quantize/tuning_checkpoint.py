"""Where tuning stands, in a file, so that a call that was killed goes on from there and ends with
the same bits.

A state is found again by the same call only: its key is a digest of all that decides over the
numbers. One that is damaged is not taken up. It is written once in a while, by the clock, since a
step may take a second or an hour: each minute, or when twenty times as long has passed as writing
takes. It weighs three float32 numbers for each that is tuned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qwlora.atomic import write_tensors
from qwlora.nn.fingerprint import take_in

_SECONDS_BETWEEN, _TIMES_WRITING = 60.0, 20


class TuningState:
    """The file; without a folder nothing is kept.

    Args:
        made_from: what the key is a digest of.
    """

    def __init__(self, folder: Path | None, made_from: Iterable[Any]):
        self._file, self._key = None if folder is None else folder / "tuning.safetensors", ""
        if folder is not None:
            take_in(digest := hashlib.sha256(), made_from)
            self._key = digest.hexdigest()
        self._due = monotonic() + _SECONDS_BETWEEN

    def read(self) -> dict[str, Tensor] | None:
        """What the same call left; None if it must begin."""
        if self._file is None:
            return None
        try:
            with safe_open(self._file, "pt") as opened:
                if (opened.metadata() or {}).get("key") != self._key:
                    return None
            return load_file(self._file)
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, state: Callable[[], dict[str, Tensor]]) -> None:
        """Keep what `state` gives, if it is time to."""
        if self._file is None or (began := monotonic()) < self._due:
            return
        write_tensors(self._file, state(), {"key": self._key})
        self._due = (now := monotonic()) + max(_SECONDS_BETWEEN, _TIMES_WRITING * (now - began))
