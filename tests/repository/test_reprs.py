"""Everything that the public API returns can be shown at any time: one short line, no address."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import qwlora
from conftest import packed_model, tiny_model

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.arange(64).view(4, 16)
EXAMPLE = {"input_ids": IDS[:1]}


def shown(value: Any) -> str:
    text = repr(value)
    assert len(text) < 600, text[:300]
    assert not re.search(r"\n| at 0x[0-9a-f]+|tensor\(", text)
    return text


def test_a_base_before_and_after_each_step(tmp_path: Path) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama")
    model.save_pretrained(tmp_path / "float")
    assert "FolderCheckpoint of llama" in shown(qwlora.open_checkpoint(tmp_path / "float"))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = qwlora.quantize_(model, "w4-block32")
    assert re.search(r"14 int4 symmetric per block 32 by search.* 4.50 bits", shown(report))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert shown(layer.encoding) == "Encoding(int4 symmetric per block 32, scale [64, 2])"
    tuned = qwlora.tune_(model, teacher, IDS, qwlora.TuningSettings(steps=1))
    rules = qwlora.LayerRule("*", None), qwlora.PlacementRule("*.softmax", keep="float")
    settings = qwlora.Limits(), qwlora.Schemes(), qwlora.TuningSettings(), qwlora.PerChannel()
    moments = qwlora.LayerMoments(torch.eye(3), torch.eye(2))
    for value in (tuned, layer, layer.quantized, layer.tensor, *rules, *settings, moments):
        shown(value)
    qwlora.save_base(model, tmp_path / "base", source="somewhere")
    assert "BaseCheckpoint of llama" in shown(qwlora.open_checkpoint(tmp_path / "base"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    reports = qwlora.initialize_(adapted, "svd", lambda path: weights[f"{path}.weight"])
    assert "InitReports of 2 layers" in shown(reports)


def test_simulations_before_and_after_each_step() -> None:
    base: Any = packed_model("llama", layers=1)
    known = qwlora.simulate(base.eval(), EXAMPLE)
    shown(known.calibrate([EXAMPLE]))
    shown(known.placement)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    simulate: Any
    for simulate in (qwlora.simulate, qwlora.simulate_adapters):
        simulation = simulate(model, EXAMPLE)
        simulation.observe([EXAMPLE])
        assert re.search(r"Simulation.*not calibrated", shown(simulation))
        simulation.freeze()
        assert "not calibrated" not in shown(simulation)
    assert shown(simulation).startswith("AdapterSimulations of default, base: Simulation of")
    adapted = qwlora.simulate(model, EXAMPLE, activation_encodings=known.activation_encodings)
    graph = qwlora.TrainingGraph(adapted)
    assert shown(graph).startswith("TrainingGraph of Simulation of")
