"""Optional packages, imported when needed; a missing one is named with its extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from qwlora.errors import MissingExtraError


def require(module: str, extra: str, purpose: str = "here") -> ModuleType:
    """Import `module`, which is needed for `purpose`.

    Raises:
        MissingExtraError: it is not installed; the message names the extra that contains it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed {purpose} and is not installed: pip install 'qwlora[{extra}]'"
        ) from error
