"""The regular expressions of an adapter's configuration, tried on a model's paths before PEFT does.

One like `(a+)+b` takes time that grows exponentially with the length of what it is matched with.
PEFT matches without a limit, and an adapter from elsewhere brings its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from qwlora.errors import SourceError
from qwlora.system.time_limit import SECONDS, time_limit


def check_pattern_times(model: nn.Module, config: Mapping[str, Any], where: str) -> None:
    """Match each regular expression in `config`, PEFT's keys, with each module path of `model`.

    Raises:
        SourceError: one takes longer than `SECONDS` for all paths.
    """
    paths = [path for path, _ in model.named_modules()]
    for key, pattern, full in _patterns(config):
        error = SourceError(
            f"{where}: {key} {pattern!r} takes more than {SECONDS:g} s to match the model's "
            "module paths; write it without nested repetitions like (a+)+"
        )
        with suppress(re.error), time_limit(error):
            compiled = re.compile(full)
            for path in paths:
                compiled.match(path)


def _patterns(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, pattern, what PEFT makes of it)."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := config.get(key), str):
            yield key, pattern, rf"(?:{pattern})\Z"
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or ():
            yield key, pattern, rf"(.*\.)?({pattern})$"
    for pattern in config.get("modules_to_save") or ():
        yield "modules_to_save", pattern, rf"(^|.*\.){pattern}($|\..*)"
    layers = config.get("layers_pattern") or ()
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield "layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
