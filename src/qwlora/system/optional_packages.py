"""Optional packages: imported where a writer needs them, and named with their extra where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from qwlora.errors import MissingExtraError


def require(module: str, extra: str) -> ModuleType:
    """Import `module`.

    Raises:
        MissingExtraError: it is not installed; the message says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is needed here and is not installed: pip install 'qwlora[{extra}]'"
        ) from error
