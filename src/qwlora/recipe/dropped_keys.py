"""Recipe keys of earlier versions. Recipes of older jobs have them, usually at their defaults.

A dropped key is ignored at its default and refused with any other value.
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


def drop_keys(content: dict[str, Any]) -> list[str]:
    """Remove dropped keys from a recipe; returns a problem for each that is not at its default."""
    return [
        problem
        for key, default in DROPPED_KEYS.items()
        for problem in _drop(content, key.split("."), default, "")
    ]


def dropped_defaults(section: str) -> dict[str, Any]:
    """Dropped keys of a section with their defaults.

    Stage keys still hash them, so that the results of older jobs stay valid.
    """
    return {
        key.removeprefix(f"{section}."): default
        for key, default in DROPPED_KEYS.items()
        if key.startswith(f"{section}.")
    }


def _drop(node: Any, path: list[str], default: Any, above: str) -> Iterator[str]:
    if isinstance(node, list):
        for index, item in enumerate(node):
            yield from _drop(item, path, default, f"{above}{index}.")
    elif isinstance(node, dict) and path[0] in node:
        key, *rest = path
        if rest:
            yield from _drop(node[key], rest, default, f"{above}{key}.")
            return
        value = node.pop(key)
        if value != default:
            yield f"{above}{key}: is {value!r}, but this option no longer exists; remove it"
