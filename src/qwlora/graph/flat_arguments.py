"""Flatten nested arguments and results to named tensors, and back.

    {"ids": A, "added": {"text": B, "scale": 2.0}, "past": ((K, V), None)}
    names      ids, added.text, past.0.0, past.0.1    in this order
    constants  2.0, None                              another value needs another graph

Mappings (ModelOutput included), tuples and lists may be nested. A key-value cache of transformers
has two tensors per layer: `past_key_values.0.key`, `past_key_values.0.value`. `fill` restores the
original types.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from qwlora.errors import CaptureError

CACHE_PARTS = ("key", "value")


@dataclass(frozen=True)
class Slot:
    """The place of a tensor."""

    name: str


@dataclass(frozen=True)
class CacheSlot:
    """The place of a key-value cache: a pair of slots per layer."""

    layers: tuple[tuple[Slot, Slot], ...]


@dataclass(frozen=True)
class Structure:
    """A value with its tensors taken out.

    Args:
        template: the value with a slot for each tensor.
        names: of the slots, in order.
        cached: names of the tensors in key-value caches.
    """

    template: Any
    names: tuple[str, ...]
    cached: frozenset[str]

    @classmethod
    def of(
        cls, value: Any, cache_name: str = "past_key_values"
    ) -> tuple[Structure, tuple[Tensor, ...]]:
        """The structure of `value`, and its tensors in the order of `names`.

        A value that is itself a tensor has the name `output`.

        Args:
            cache_name: prefix of the names of cached tensors.

        Raises:
            CaptureError: two tensors would have the same name, or a cache has no pairs of keys and
                values.
        """
        found: list[tuple[str, Tensor]] = []
        cached: list[str] = []

        def slot(name: str, tensor: Tensor) -> Slot:
            found.append((name, tensor))
            return Slot(name)

        def place(path: str, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return slot(path or "output", leaf)
            if not isinstance(leaf, Cache):
                return leaf
            layers = []
            for index, pair in enumerate(_pairs(leaf, path)):
                names = [f"{cache_name}.{index}.{part}" for part in CACHE_PARTS]
                cached.extend(names)
                layers.append((slot(names[0], pair[0]), slot(names[1], pair[1])))
            return CacheSlot(tuple(layers))

        template = _mapped(value, place)
        names = tuple(name for name, _ in found)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CaptureError(
                f"two tensors of the arguments or the result would be called {twice[0]}; rename one"
            )
        return cls(template, names, frozenset(cached)), tuple(tensor for _, tensor in found)

    def fill(self, tensors: Mapping[str, Tensor]) -> Any:
        """The value with `tensors` by name in its slots."""

        def filled(_: str, leaf: Any) -> Any:
            if isinstance(leaf, Slot):
                return tensors[leaf.name]
            if isinstance(leaf, CacheSlot):
                return cache_of([(tensors[k.name], tensors[v.name]) for k, v in leaf.layers])
            return leaf

        return _mapped(self.template, filled)

    def flatten(self, value: Any) -> tuple[Tensor, ...]:
        """The tensors of another value of this structure.

        Constants and None may be left out.

        Raises:
            CaptureError: its structure or a constant differs. The message names the first place.
        """
        expected = dict(_leaves(self.template))
        given = dict(_leaves(value, stop_at=expected))
        for path, leaf in given.items():
            if path not in expected and leaf is not None:
                raise CaptureError(
                    f"{path}: the graph was captured without this argument; omit it, or capture "
                    "again with it"
                )
        tensors: list[Tensor] = []
        for path, leaf in expected.items():
            tensors += _matching(path or "the arguments", leaf, given.get(path, _MISSING))
        return tuple(tensors)


_MISSING = object()


def _matching(path: str, expected: Any, value: Any) -> list[Tensor]:
    """The tensors of the argument at `path`, where the template has `expected`."""
    if value is _MISSING:
        if isinstance(expected, Slot | CacheSlot):
            raise CaptureError(
                f"{path}: the graph was captured with this argument; give it, or capture again "
                "without it"
            )
        return []
    if isinstance(expected, Slot):
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"{path}: the graph was captured with a tensor, not with {value!r}; give a "
                "tensor, or capture again"
            )
        return [value]
    if isinstance(expected, CacheSlot):
        pairs = _pairs(value, path) if isinstance(value, Cache) else list(value or ())
        if len(pairs) != len(expected.layers):
            raise CaptureError(
                f"{path}: the graph was captured with a cache of {len(expected.layers)} layers, "
                f"not of {len(pairs)}; capture again"
            )
        return [tensor for pair in pairs for tensor in pair[:2]]
    if isinstance(value, Tensor) or not (value is expected or value == expected):
        raise CaptureError(
            f"{path}: the graph was captured with the constant {expected!r}; to use {value!r}, "
            "capture again"
        )
    return []


def _leaves(value: Any, path: str = "", stop_at: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Everything in `value` that is no mapping, tuple or list, or whose path is in `stop_at`."""
    if path in stop_at or not isinstance(value, Mapping | tuple | list):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _leaves(item, _join(path, key), stop_at)


def _mapped(value: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """`value` with `change(path, leaf)` in place of each leaf."""
    if isinstance(value, Mapping):
        items = {key: _mapped(item, change, _join(path, key)) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple | list):
        parts = [_mapped(item, change, _join(path, i)) for i, item in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return change(path, value)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _pairs(cache: Cache, path: str) -> list[tuple[Tensor, Tensor]]:
    pairs = [
        (getattr(layer, "keys", None), getattr(layer, "values", None))
        for layer in getattr(cache, "layers", [])
    ]
    if not pairs or not all(isinstance(part, Tensor) for pair in pairs for part in pair):
        raise CaptureError(
            f"{path}: a {type(cache).__name__} does not have a key and a value for each layer; "
            "capture without a cache (use_cache=False)"
        )
    return pairs  # type: ignore[return-value]


def tokens_in(cache: Any) -> int:
    """Tokens in a cache or in pairs of keys and values [batch, heads, tokens, width].

    The maximum over layers, since some layers keep only a window.
    """
    pairs = _pairs(cache, "the cache") if isinstance(cache, Cache) else list(cache or ())
    return max((int(key.shape[-2]) for key, *_ in pairs), default=0)


def cache_of(pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache with `pairs` of keys and values [batch, heads, tokens, width], one per layer."""
    cache = DynamicCache()
    for key, value in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value  # without the copies that `update` makes
        cache.layers.append(layer)
    return cache
