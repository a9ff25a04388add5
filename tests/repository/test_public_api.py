"""Signatures of the public API name public types only: whoever calls it needs no other import."""

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qwlora
from qwlora.formats import aimet_encodings

NAMES = sorted(qwlora.__all__)
PUBLIC = {getattr(qwlora, name) for name in NAMES} | {
    value
    for name in vars(aimet_encodings)
    if isinstance(value := getattr(aimet_encodings, name), type)
}
LIBRARIES = {"builtins", "collections", "jaxtyping", "numpy", "os", "pathlib", "peft", "torch"}
LIBRARIES |= {"transformers", "types", "typing"}
# Classes of which functions return instances, and attributes that are there for this package.
RETURNED = {"AdapterSimulations", "CalibrationReport", "InitReports", "PackedLinear", "Placement"}
RETURNED |= {"QuantizeReport", "SimulatedModel", "Simulation", "TrainingGraph", "TuningReport"}
RETURNED |= {"Documents", "PreparedText", "TokenScores"}
INTERNAL = {
    "PackedLinear": {"from_layer", "packed_weight", "tensor"},
    "Placement": {"marks"},
    "PlacementRule": {"options"},
    "PolicyRule": {"options"},
    "Simulation": {"graph", "marks"},
}


def types_in(annotation: Any) -> set[Any]:
    """The classes that an annotation names."""
    if not (parts := typing.get_args(annotation)):
        return {annotation}
    if typing.get_origin(annotation) is typing.Literal:
        return set()
    flat = [inner for part in parts for inner in (part if isinstance(part, list) else [part])]
    return set().union(*map(types_in, flat))


def module_of(kind: Any) -> str:
    return getattr(kind, "__module__", "builtins").partition(".")[0]


def signatures(value: Any, name: str) -> list[Callable[..., Any]]:
    """What a user calls: the function, or the constructor and the public methods and properties."""
    if not isinstance(value, type):
        return [value]
    found = [] if name in RETURNED else [value.__init__]
    for attribute, member in inspect.getmembers(value):
        function = inspect.unwrap(getattr(member, "fget", getattr(member, "__func__", member)))
        if (
            not attribute.startswith("_")
            and attribute not in INTERNAL.get(name, ())
            and inspect.isfunction(function)
            and function.__module__.startswith("qwlora.")
        ):
            found.append(function)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_signatures_name_public_types_only(name: str) -> None:
    others = {
        f"{function.__qualname__}({argument}): {kind}"
        for function in signatures(getattr(qwlora, name), name)
        for argument, hint in hints(function).items()
        for kind in types_in(hint)
        if kind not in PUBLIC and module_of(kind) not in LIBRARIES
    }
    assert others == set()


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    names = (PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor, qwlora.Sequences)
    return typing.get_type_hints(function, localns={t.__name__: t for t in names})


def test_a_private_type_in_a_signature_is_noticed() -> None:
    from qwlora.graph.capture import capture

    assert not types_in(hints(capture)["return"]) <= PUBLIC
