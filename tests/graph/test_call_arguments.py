"""Nested arguments as flat tensors and back."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from qwlora.errors import CaptureError
from qwlora.graph.call_arguments import Structure, cache_of

LEAVES = st.one_of(st.none(), st.sampled_from([0, 1, 2.5, "a"]), st.integers(1, 3).map(torch.ones))
KEYS = st.sampled_from(["a", "b", "ab"])
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and same([*one.values()], [*other.values()])
    if isinstance(one, list | tuple):
        is_alike = type(one) is type(other) and len(one) == len(other)
        return is_alike and all(map(same, one, other))
    return one is other if isinstance(one, torch.Tensor) else one == other


@given(st.dictionaries(KEYS, NESTED, max_size=4))
def test_filling_gives_back_what_was_flattened(value: dict[str, Any]) -> None:
    structure, tensors = Structure.of(value)
    assert len(set(structure.names)) == len(structure.names) == len(tensors)
    assert same(structure.fill(dict(zip(structure.names, tensors, strict=True))), value)
    assert same(list(structure.flatten(value)), list(tensors))


def test_names_are_paths_and_types_come_back() -> None:
    x = torch.ones(2)
    value = {"ids": x, "added": {"text": x, "scale": 2.0}, "parts": (x, None, [x])}
    value["encoder_outputs"] = BaseModelOutput(last_hidden_state=x)
    structure, tensors = Structure.of(value)
    names = "ids added.text parts.0 parts.2.0 encoder_outputs.last_hidden_state"
    assert " ".join(structure.names) == names
    filled = structure.fill(dict(zip(structure.names, tensors, strict=True)))
    assert isinstance(filled["encoder_outputs"], BaseModelOutput)
    assert Structure.of(x)[0].names == ("output",)
    with pytest.raises(CaptureError, match=r"would be called a\.b; rename one"):
        Structure.of({"a": {"b": x}, "a.b": x})


def test_a_cache_is_its_keys_and_values() -> None:
    pairs = [(torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4)) for _ in range(2)]
    structure, tensors = Structure.of({"past": cache_of(pairs)}, "present")
    names = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert structure.names == tuple(names)
    assert structure.cached == set(structure.names)
    back = structure.fill(dict(zip(structure.names, tensors, strict=True)))["past"]
    assert isinstance(back, DynamicCache)
    assert back.layers[1].values is pairs[1][1]
    parts = [part for pair in pairs for part in pair]
    assert same(list(structure.flatten({"past": pairs})), parts)
    with pytest.raises(CaptureError, match="captured with a cache of 2 layers, not of 1"):
        structure.flatten({"past": pairs[:1]})
    with pytest.raises(CaptureError, match="does not have a key and a value"):
        Structure.of({"past": cache_of([])})


X = torch.ones(1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": X, "n": 3, "more": {"y": X}}, "n: .* the constant 2"),
        ({"n": 2, "more": {"y": X}}, "x: .* captured with a tensor, not with None"),
        ({"x": X, "n": 2, "more": {}}, "more.y: .* captured with a tensor, not with None"),
        ({"x": X, "n": 2, "more": {"y": X, "z": 1}}, "more.z: .* captured without this"),
    ],
)
def test_another_structure_is_refused(value: dict[str, Any], message: str) -> None:
    structure, _ = Structure.of({"x": X, "n": 2, "more": {"y": X}})
    with pytest.raises(CaptureError, match=message):
        structure.flatten(value)
    # constants and None may be left out
    assert len(structure.flatten({"x": X, "more": {"y": X}, "z": None})) == 2
