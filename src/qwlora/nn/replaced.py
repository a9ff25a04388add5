"""An attribute of one instance, such as its `forward`, replaced until a context ends.

Hooks and `parametrize` come first. This is for what they cannot do: compute the same result in
another way, without running the module's own forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def replaced(module: nn.Module, value: Any, name: str = "forward") -> Iterator[None]:
    """Set attribute `name` of `module`; afterwards, restore what was set on the instance before."""
    attributes = vars(module)
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(before)
