"""Recipe keys of earlier versions. Recipes of older jobs have them, usually at their defaults.

A dropped or renamed key is ignored at its default. With any other value it is refused; the message
names the new key, if there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Key and default. In a list such as `adapters`, a key applies to every item.
DROPPED_KEYS: dict[str, Any] = {
    "adapters.rank_budget": None,
    "adapters.rank_cap": None,
    "simulation.momentum": 0.01,
    "simulation.still_share": None,
    "simulation.still_batches": 4,
}
# Key and its new name. The default is null.
RENAMED_KEYS = {"adapters.start": "continue_from"}


def drop_keys(content: dict[str, Any]) -> list[str]:
    """Remove keys of earlier versions from a recipe; returns a problem for each that is not at its
    default.
    """
    dropped = [
        f"{key}: is {value!r}, but this option no longer exists; remove it"
        for path, default in DROPPED_KEYS.items()
        for key, value in _popped(content, path.split("."), "")
        if value != default
    ]
    renamed = [
        f"{key}: is now called {new}; rename it"
        for path, new in RENAMED_KEYS.items()
        for key, value in _popped(content, path.split("."), "")
        if value is not None
    ]
    return dropped + renamed


def dropped_defaults(section: str) -> dict[str, Any]:
    """Dropped keys of a section with their defaults.

    Stage keys still hash them, so that the results of older jobs stay valid.
    """
    return {
        key.removeprefix(f"{section}."): default
        for key, default in DROPPED_KEYS.items()
        if key.startswith(f"{section}.")
    }


def _popped(node: Any, path: list[str], above: str) -> Iterator[tuple[str, Any]]:
    """Remove the key at `path` wherever it is set; yields the key in full and its value."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _popped(item, path, f"{above}{index}.")
    elif isinstance(node, dict) and path[0] in node:
        key, *rest = path
        if rest:
            yield from _popped(node[key], rest, f"{above}{key}.")
        else:
            yield f"{above}{key}", node.pop(key)
