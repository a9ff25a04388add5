"""Flatten nested arguments and results to named tensors, and back.

    {"ids": A, "added": {"text": B, "scale": 2.0}, "past": ((K, V), None)}
    names      ids, added.text, past.0.0, past.0.1    in this order
    constants  2.0, None                              another value needs another graph

Mappings (ModelOutput included), tuples and lists may be nested. A key-value cache of transformers
has two tensors per layer: `past_key_values.0.key`, `past_key_values.0.value`. `fill` restores the
original types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
        cached: set[str] = set()
        template = _template(value, "", _Collector(found, cached, cache_name))
        names = tuple(name for name, _ in found)
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CaptureError(
                f"two tensors of the arguments or the result would be called {twice[0]}; rename one"
            )
        return cls(template, names, frozenset(cached)), tuple(tensor for _, tensor in found)

    def fill(self, tensors: Mapping[str, Tensor]) -> Any:
        """The value with `tensors` by name in its slots."""
        return _filled(self.template, tensors)

    def flatten(self, value: Any) -> tuple[Tensor, ...]:
        """The tensors of another value of this structure.

        Raises:
            CaptureError: its structure or a constant differs. The message names the first place.
        """
        return tuple(_matching(self.template, value, ""))


@dataclass(frozen=True)
class _Collector:
    found: list[tuple[str, Tensor]]
    cached: set[str]
    cache_name: str

    def slot(self, name: str, tensor: Tensor) -> Slot:
        self.found.append((name, tensor))
        return Slot(name)


def _template(value: Any, path: str, collect: _Collector) -> Any:
    if isinstance(value, Tensor):
        return collect.slot(path or "output", value)
    if isinstance(value, Cache):
        layers = []
        for index, pair in enumerate(_pairs(value, path)):
            names = [f"{collect.cache_name}.{index}.{part}" for part in CACHE_PARTS]
            collect.cached.update(names)
            layers.append((collect.slot(names[0], pair[0]), collect.slot(names[1], pair[1])))
        return CacheSlot(tuple(layers))
    return _mapped(value, lambda key, inner: _template(inner, _join(path, key), collect))


def _filled(template: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(template, Slot):
        return tensors[template.name]
    if isinstance(template, CacheSlot):
        return cache_of(
            [(tensors[key.name], tensors[value.name]) for key, value in template.layers]
        )
    return _mapped(template, lambda _, inner: _filled(inner, tensors))


def _matching(template: Any, value: Any, path: str) -> Iterator[Tensor]:
    """The tensors of `value` where `template` has slots."""
    where = path or "the arguments"
    if isinstance(template, Slot):
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"{where}: the graph was captured with a tensor, not with {value!r}; give a "
                "tensor, or capture again"
            )
        yield value
    elif isinstance(template, CacheSlot):
        pairs = _pairs(value, path) if isinstance(value, Cache) else list(value or ())
        if len(pairs) != len(template.layers):
            raise CaptureError(
                f"{where}: the graph was captured with a cache of {len(template.layers)} layers, "
                f"not of {len(pairs)}; capture again"
            )
        for pair in pairs:
            yield from pair[:2]
    elif isinstance(template, Mapping | tuple | list):
        expected = dict(_items(template))
        found = dict(_items(value)) if isinstance(value, Mapping | tuple | list) else {}
        unknown = [key for key in found if key not in expected and found[key] is not None]
        if unknown:
            raise CaptureError(
                f"{_join(path, unknown[0])}: the graph was captured without this argument; omit "
                "it, or capture again with it"
            )
        for key, inner in expected.items():
            yield from _matching(
                inner,
                found[key] if key in found else _absent(inner, _join(path, key)),
                _join(path, key),
            )
    elif isinstance(value, Tensor) or not (value is template or value == template):
        raise CaptureError(
            f"{where}: the graph was captured with the constant {template!r}; to use {value!r}, "
            "capture again"
        )


def _absent(template: Any, path: str) -> Any:
    """The value of a missing argument: a constant may be omitted, a tensor may not."""
    if isinstance(template, Slot | CacheSlot | Mapping | tuple | list) and any(
        True for _ in _slots(template)
    ):
        raise CaptureError(
            f"{path}: the graph was captured with this argument; give it, or capture again without "
            "it"
        )
    return template


def _slots(template: Any) -> Iterator[Slot]:
    if isinstance(template, Slot):
        yield template
    elif isinstance(template, CacheSlot):
        for pair in template.layers:
            yield from pair
    elif isinstance(template, Mapping | tuple | list):
        for _, inner in _items(template):
            yield from _slots(inner)


def _items(value: Any) -> list[tuple[str, Any]]:
    return [
        (str(key), inner)
        for key, inner in (value.items() if isinstance(value, Mapping) else enumerate(value))
    ]


def _mapped(value: Any, change: Callable[[str, Any], Any]) -> Any:
    """`value` with `change(key, inner)` applied to its items; a leaf is returned unchanged."""
    if isinstance(value, Mapping):
        changed = {key: change(str(key), inner) for key, inner in value.items()}
        return changed if type(value) is dict else type(value)(**changed)
    if isinstance(value, tuple | list):
        inner = [change(str(index), each) for index, each in enumerate(value)]
        return type(value)(*inner) if hasattr(value, "_fields") else type(value)(inner)
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


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
