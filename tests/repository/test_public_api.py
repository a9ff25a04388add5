"""Signatures of the public API name public types only: whoever calls it needs no other import."""

import importlib
import inspect
import logging
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import qwlora
from conftest import tiny_model
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


def test_names_that_are_loaded_later_are_listed_and_torchao_is_silent(monkeypatch, caplog) -> None:
    assert {*NAMES, "__version__"} <= set(dir(qwlora))
    logger = logging.getLogger("torchao")
    caplog.set_level(logging.WARNING, "torchao")  # a command in this process may have changed it

    def imported(module: str) -> Any:
        logger.warning("Failed to load %s", module)
        logger.error("no such file")
        raise ImportError

    monkeypatch.setattr(importlib, "import_module", imported)
    with pytest.raises(ImportError):
        qwlora.__getattr__("simulate")
    logger.warning("later")  # the caller's own logging is as it was
    assert caplog.messages == ["no such file", "later"]


def hints(function: Callable[..., Any]) -> dict[str, Any]:
    names = (PreTrainedModel, PreTrainedTokenizerBase, torch.Tensor, qwlora.Sequences)
    return typing.get_type_hints(function, localns={t.__name__: t for t in names})


@pytest.mark.usefixtures("shared_captures")
def test_what_is_returned_is_shown_in_one_line(tmp_path: Path) -> None:
    ids = torch.arange(64).view(4, 16)
    example = {"input_ids": ids[:1]}
    model: Any = tiny_model("llama", layers=1)
    model.save_pretrained(tmp_path / "float")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = qwlora.quantize_(model, "w4-block32")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    tuned = qwlora.tune_(model, tiny_model("llama", layers=1), ids, qwlora.TuningSettings(steps=1))
    qwlora.save_base(model, tmp_path / "base", source="somewhere")
    checkpoints = [qwlora.open_checkpoint(tmp_path / name) for name in ("float", "base")]
    known = qwlora.simulate(model.eval(), example)
    calibrated = known.calibrate([example])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    started = qwlora.initialize_(adapted, "svd", lambda path: weights[f"{path}.weight"])
    simulation = qwlora.simulate(adapted, example, activation_encodings=known.activation_encodings)
    several = qwlora.simulate_adapters(adapted, example)
    several.observe([example])
    shown = repr(several)
    assert "not calibrated" in shown
    several.freeze()
    assert "not calibrated" not in repr(several)
    values = [report, layer, layer.encoding, layer.quantized, layer.tensor, tuned, *checkpoints]
    values += [known, calibrated, known.placement, started, simulation, several]
    values += [qwlora.TrainingGraph(simulation), qwlora.Limits(), qwlora.Schemes()]
    values += [qwlora.LayerRule("*", None), qwlora.PlacementRule("*.softmax", keep="float")]
    values += [qwlora.PerChannel(), qwlora.LayerMoments(torch.eye(3), torch.eye(2))]
    for text in (shown, *map(repr, values)):
        assert len(text) < 600, text[:300]
        assert not re.search(r"\n| at 0x[0-9a-f]+|tensor\(", text)
