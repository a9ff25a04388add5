"""Model arguments: convert a DataLoader's batches to keyword arguments, and nested arguments or
results to named tensors and back.

    {"input_ids": ids, "labels": labels}    by name; labels are dropped if the model takes none
    ids                                     the first argument
    (ids, mask), [ids, mask]                the first arguments, in order

A `Structure` is a value with its tensors taken out:

    {"ids": A, "added": {"text": B, "scale": 2.0}, "past": ((K, V), None)}
    names      ids, added.text, past.0.0, past.0.1    in this order
    constants  2.0, None                              a different value needs a new graph

Mappings (ModelOutput included), tuples and lists may be nested. A key-value cache of transformers
has two tensors per layer: `past_key_values.0.key`, `past_key_values.0.value`. `fill` restores the
original types.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from qwlora.errors import CaptureError, QwloraError

LABELS = "labels"
_MASK = "attention_mask"


def arguments_of(model: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a model's forward, in order, through PEFT's wrapper."""
    inner = getattr(model, "get_base_model", lambda: model)()
    return tuple(inspect.signature(inner.forward).parameters)


def as_arguments(batch: Any, names: Sequence[str], what: str = "A batch") -> dict[str, Any]:
    """`batch` by argument name. `names` are the arguments of the model or graph, in order. Refuses
    other types, too many tensors, and a tensor (usually labels) in place of the attention mask."""
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != LABELS or name in names}
    tensors = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Tensor) for t in tensors):
        raise CaptureError(
            f"{what} is a {type(batch).__name__}. Give a dict of arguments, a tensor, or a tuple "
            "of tensors"
        )
    if len(tensors) > len(names):
        raise CaptureError(
            f"{what} has {len(tensors)} tensors, but there are {len(names)} inputs "
            f"({', '.join(names)}). Give a dict of arguments"
        )
    arguments = dict(zip(names, tensors, strict=False))
    mask = arguments.get(_MASK)
    if mask is not None and mask.ndim == 2 and bool(((mask != 0) & (mask != 1)).any()):
        raise CaptureError(
            f"{what}: tensor {list(arguments).index(_MASK)} would be {_MASK}, but has values "
            "other than 0 and 1. Give a dict of arguments"
        )
    return arguments


def check_token_ids(
    arguments: Mapping[str, Any], model: nn.Module, error: type[QwloraError]
) -> None:
    """Refuse token ids that are not integers [batch, tokens], or are outside the vocabulary."""
    ids = arguments.get("input_ids")
    if not isinstance(ids, Tensor):
        return
    if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2 or not ids.numel():
        raise error(
            f"input_ids are {ids.dtype} of shape {list(ids.shape)}, but token ids are torch.int64 "
            "of shape [batch, tokens], with at least one token"
        )
    vocabulary = vocabulary_size(model)
    lowest, highest = (int(end) for end in ids.aminmax())
    if vocabulary and not 0 <= lowest <= highest < vocabulary:
        raise error(
            f"token ids range from {lowest} to {highest}, but the model's vocabulary has "
            f"{vocabulary} entries. Use the tokenizer of this model"
        )


def vocabulary_size(model: nn.Module) -> int:
    """Number of rows of the input embedding; 0 if the model has none."""
    try:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # a model that reads no tokens
        return 0
    config = getattr(model, "config", None)
    rows = getattr(embeddings, "num_embeddings", None) or getattr(config, "vocab_size", None)
    return int(rows or 0)


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
    """A value without its tensors. The template has a slot for each tensor; `names` are the names
    of the slots in order, `cached` the names of tensors in key-value caches."""

    template: Any
    names: tuple[str, ...]
    cached: frozenset[str]

    @classmethod
    def of(
        cls, value: Any, cache_name: str = "past_key_values"
    ) -> tuple[Structure, tuple[Tensor, ...]]:
        """The structure of `value`, and its tensors in the order of `names`. `cache_name` is the
        prefix of the names of cached tensors."""
        tensors: dict[str, Tensor] = {}
        cached: list[str] = []

        def slot(name: str, tensor: Tensor) -> Slot:
            if name in tensors:
                raise CaptureError(
                    f"two tensors of the arguments or the result would be called {name}; rename one"
                )
            tensors[name] = tensor
            return Slot(name)

        def place(path: str, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return slot(path or "output", leaf)
            if not isinstance(leaf, Cache):
                return leaf
            layers = []
            for index, pair in enumerate(_pairs(leaf, path)):
                names = [f"{cache_name}.{index}.{part}" for part in ("key", "value")]
                cached.extend(names)
                layers.append((slot(names[0], pair[0]), slot(names[1], pair[1])))
            return CacheSlot(tuple(layers))

        template = _mapped(value, place)
        return cls(template, tuple(tensors), frozenset(cached)), tuple(tensors.values())

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
        """The tensors of another value of this structure; constants and None may be omitted.
        Refuses a different structure or constant, and names the first difference."""
        expected = dict(_leaves(self.template))
        given = dict(_leaves(value, stop_at=expected))
        if more := [path for path in given if path not in expected and given[path] is not None]:
            raise CaptureError(
                f"{more[0]}: the graph was captured without this argument; omit it, or capture "
                "again with it"
            )
        tensors: list[Tensor] = []
        for path, leaf in expected.items():
            actual = given.get(path)
            if isinstance(leaf, Slot) and isinstance(actual, Tensor):
                tensors.append(actual)
            elif isinstance(leaf, CacheSlot):
                pairs = _pairs(actual, path)
                if len(pairs) != len(leaf.layers):
                    raise CaptureError(
                        f"{path}: the graph was captured with a cache of {len(leaf.layers)} "
                        f"layers, not of {len(pairs)}; capture again"
                    )
                tensors += [tensor for pair in pairs for tensor in pair[:2]]
            elif isinstance(leaf, Slot) or (
                path in given
                and (isinstance(actual, Tensor) or not (actual is leaf or actual == leaf))
            ):
                kind = "a tensor" if isinstance(leaf, Slot) else f"the constant {leaf!r}"
                raise CaptureError(
                    f"{path or 'the arguments'}: the graph was captured with {kind}, not with "
                    f"{actual!r}; give the same, or capture again"
                )
        return tuple(tensors)


def _leaves(value: Any, path: str = "", stop_at: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Everything in `value` that is not a mapping, tuple or list, or whose path is in `stop_at`."""
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


def _pairs(cache: Any, path: str) -> list[tuple[Tensor, ...]]:
    if not isinstance(cache, Cache):
        return list(cache or ())
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
    """Tokens in a cache or in pairs of keys and values [batch, heads, tokens, width]."""
    # the maximum over layers, since some layers keep only a window
    return max((int(key.shape[-2]) for key, *_ in _pairs(cache, "the cache")), default=0)


def cache_of(pairs: list[tuple[Tensor, Tensor]]) -> DynamicCache:
    """A cache with `pairs` of keys and values [batch, heads, tokens, width], one per layer."""
    cache = DynamicCache()
    for key, value in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        # without the copies that `update` makes
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache
