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
    assert "\n" not in text
    assert not re.search(r" at 0x[0-9a-f]+", text)
    assert "tensor(" not in text
    return text


def test_values_without_a_model() -> None:
    scheme = qwlora.Scheme(4, granularity=qwlora.PerBlock(32))
    rules = qwlora.LayerRule("*", scheme), qwlora.PlacementRule("*.softmax", keep="float")
    moments = qwlora.MomentStore(), qwlora.LayerMoments(torch.eye(3), torch.eye(2))
    settings = qwlora.Limits(), qwlora.Schemes(), qwlora.TuningSettings()
    kinds = qwlora.PerTensor(), qwlora.PerChannel(), qwlora.QwloraError("text")
    for value in (scheme, *rules, *moments, *settings, *kinds):
        shown(value)


def test_a_base_before_and_after_each_step(tmp_path: Path) -> None:
    model, teacher = tiny_model("llama"), tiny_model("llama")
    model.save_pretrained(tmp_path / "float")
    assert "FolderCheckpoint of llama" in shown(qwlora.open_checkpoint(tmp_path / "float"))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = qwlora.quantize_(model, "w4-block32")
    assert re.search(r"14 int4 symmetric per block 32 by search.* 4.50 bits", shown(report))
    assert "14 layers in memory" in shown(qwlora.observe_moments(model, IDS))
    shown(qwlora.tune_(model, teacher, IDS, qwlora.TuningSettings(steps=1)))
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert shown(layer.encoding) == "Encoding(int4 symmetric per block 32, scale [64, 2])"
    shown(layer)
    shown(layer.quantized)
    shown(layer.tensor)
    qwlora.save_base(model, tmp_path / "base", source="somewhere")
    assert "BaseCheckpoint of llama" in shown(qwlora.open_checkpoint(tmp_path / "base"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    reports = qwlora.initialize_(adapted, "svd", lambda path: weights[f"{path}.weight"])
    assert "InitReports of 2 layers" in shown(reports)


def quantized(adapter: bool = False) -> Any:
    model: Any = packed_model("llama", layers=1)
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return model.eval()


@pytest.mark.parametrize("several", [False, True])
def test_a_simulation_before_and_after_each_step(tmp_path: Path, several: bool) -> None:
    adapted = quantized(adapter=True)
    simulate: Any = qwlora.simulate_adapters if several else qwlora.simulate
    simulation = simulate(adapted, EXAMPLE)
    assert re.search(r"Simulation.*not calibrated", shown(simulation))
    simulation.observe([EXAMPLE])
    assert "not calibrated" in shown(simulation)
    simulation.freeze()
    assert "not calibrated" not in shown(simulation)
    if several:
        assert shown(simulation).startswith("AdapterSimulations of default, base: Simulation of")
        return
    shown(simulation.calibrate([EXAMPLE]))
    shown(simulation.placement)
    simulation.save(tmp_path)
    shown(qwlora.load_simulation(tmp_path, adapted))


def test_a_training_graph() -> None:
    simulation = qwlora.simulate(quantized(), EXAMPLE)
    simulation.calibrate([EXAMPLE])
    known = simulation.activation_encodings
    adapted = qwlora.simulate(quantized(adapter=True), EXAMPLE, activation_encodings=known)
    graph = qwlora.TrainingGraph(adapted)
    assert shown(graph).startswith("TrainingGraph of Simulation of")
