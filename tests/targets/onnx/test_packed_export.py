"""Exports of packed embeddings, tied heads and float offsets, run in ONNX Runtime."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import tiny_model
from formats.packing import packed_and_twin
from qwlora import Simulation, simulate
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.scheme import PerBlock, PerTensor, Scheme, parse_scheme
from qwlora.nn import packed_weights
from qwlora.simulation.adapter_simulations import load_simulation
from qwlora.simulation.saved_simulation import load_encodings
from qwlora.targets.onnx.onnx import export_onnx
from targets.proofs import check_parity, verify_onnx

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
FLOAT_BLOCKS = Scheme(4, False, PerBlock(16), float_offset=True)
SLOW = [Scheme(3, False, PerTensor(), float_offset=True)]
SLOW += map(parse_scheme, ("w4-lpbq16", "w3-signed16"))
SCHEMES = [FLOAT_BLOCKS, *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in SLOW)]


def exported(scheme: Scheme, folder: Path) -> tuple[torch.nn.Module, Simulation]:
    """A llama whose embedding, head and layers are all packed."""
    model, _ = packed_and_twin(tiny_model("llama", layers=1), scheme)
    torch.manual_seed(1)
    adapted = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    simulation = simulate(adapted, BATCH)
    simulation.calibrate([BATCH])
    export_onnx(simulation.graph(), folder)
    return adapted, simulation


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_file_computes_what_was_simulated(tmp_path: Path, scheme: Scheme) -> None:
    model, simulation = exported(scheme, tmp_path)
    weights = packed_weights(model)
    assert {mark.name for mark in simulation.marks if mark.kind is Kind.BASE} == set(weights)
    assert weights["lm_head.weight"].is_tied
    check_parity(verify_onnx(tmp_path, simulation, IDS, layer_tokens=16), str(scheme))
    file = onnx.load(tmp_path / "model.onnx")
    arrays = {i.name: i for i in file.graph.initializer}
    types = {i.data_type for name, i in arrays.items() if name.endswith((".scale", ".minimum"))}
    assert types == {onnx.TensorProto.FLOAT}
    assert all(f"{name}.codes" in arrays for name in weights)
    assert not any(
        np.prod(i.dims) == 260 * 64 and i.data_type == onnx.TensorProto.FLOAT
        for i in arrays.values()
    )  # no float copy of the embedding
    entries = json.loads((tmp_path / "model.encodings").read_text())
    named = {entry["name"] for entry in entries["param_encodings"]}
    is_left_out = scheme.float_offset  # AIMET has no such grids
    left_out = {name.removesuffix(".weight") for name in weights} if is_left_out else set()
    assert set(entries["excluded_layers"]) == left_out
    assert (set(weights) <= named) is not is_left_out


def test_float_offsets_come_back_from_disk(tmp_path: Path) -> None:
    model, _ = packed_and_twin(tiny_model("llama", layers=1), FLOAT_BLOCKS)
    simulation = simulate(model.eval(), BATCH)
    simulation.calibrate([BATCH])
    simulation.save(tmp_path)
    # no encodings file can hold it, and the base does
    assert "lm_head.weight" not in load_encodings(tmp_path)
    again = load_simulation(tmp_path, model)
    found = again.encodings["lm_head.weight"]
    assert found.scheme.float_offset
    assert torch.equal(found.minimum, packed_weights(model)["lm_head.weight"].encoding.minimum)
    assert torch.equal(again.logits(IDS), simulation.logits(IDS))
