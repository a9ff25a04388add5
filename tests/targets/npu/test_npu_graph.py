"""Graphs for an NPU: what the host computes, and that prefill and decode are the simulation."""

from pathlib import Path

import onnx_ir
import pytest
import torch
from peft import LoraConfig, get_peft_model

from qwlora import LayerRule, Scheme, Schemes, quantize_, simulate
from qwlora.errors import CalibrationError, CaptureError
from qwlora.simulation.kv_cache_graph import CacheSizes, cache_sizes
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.npu_graph import npu_graph
from qwlora.targets.npu.qnn import QnnModel
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedGraph
from simulation.tiny_architectures import inputs, make
from targets.proofs import sqnr

CONTEXT, FIRST, TOKENS = 24, 9, 14
TEXT = torch.randint(3, 256, (1, TOKENS), generator=torch.Generator().manual_seed(7))
SCHEMES = Schemes(
    quantize_residual_adds=True,
    symmetric_matmul_second_input=True,
    key_value_bitwidth=8,
    adapter_weights=Scheme(8),
)
OTHERS = ("GPT-2", "Gemma 3", "Phi-3", "Qwen3", "OPT", "GPT-NeoX", "Qwen2")


def simulated(name: str, schemes: Schemes = SCHEMES) -> Simulation:
    model = make(name)
    embeddings = {"GPT-2": ["*wte", "*wpe"], "GPT-NeoX": ["*embed_in"], "OPT": ["*embed_*"]}
    rules = [LayerRule(n, Scheme(8)) for n in embeddings.get(name, ["*embed_tokens"])]
    quantize_(model, "w4-channel", solver="rtn", rules=rules)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    simulation = simulate(get_peft_model(model, config).eval(), inputs(name), schemes)
    simulation.calibrate([{"input_ids": TEXT}])
    return simulation


@pytest.mark.slow  # targets/npu/test_qairt.py does the same with adapters in the fast lane
@pytest.mark.parametrize("name", ["Llama", *OTHERS])
def test_prefill_then_decode_is_the_simulation(name: str, tmp_path: Path) -> None:
    simulation, sizes = simulated(name), cache_sizes([FIRST, 1], [CONTEXT])
    prefill, decode = (npu_graph(simulation, each).device.encodings for each in sizes)
    assert prefill.keys() <= decode.keys()
    for each in prefill:  # one grid for a tensor in all graphs
        assert torch.equal(prefill[each].scale, decode[each].scale), each
    exported = ExportedGraph(simulation, {}, {"input_ids": TEXT}, "1.0.0", sizes)
    TARGETS["qnn"].backend.write_cases(exported, {"only": exported}, tmp_path)
    model = QnnModel(tmp_path / "base", tmp_path / "only", htp=False)
    for graph in model.models.values():
        assert_scales_by_block(onnx_ir.load(graph.file))
        taken = {i.name: i.type for i in graph.session.get_inputs()}
        integers = {name for name, kind in taken.items() if "float" not in kind}
        codes = {name for name in taken if name.endswith(".codes") and ".lora_" in name}
        assert integers == codes | ({"input_ids", "position_ids"} & taken.keys())
    assert all(prefill[cached].scheme == Scheme(8) for cached in model.empty_cache())
    logits, expected = model.logits(TEXT, steps=TOKENS - FIRST), simulation.logits(TEXT)
    # cosines, sines, masked scores and sums with a bias have 16-bit grids in the graph alone, and a
    # rounding of theirs may move a key or value by one of its 255 steps
    assert sqnr(logits, expected) > 40
    assert float((logits.argmax(-1) == expected.argmax(-1)).float().mean()) > 0.9


def assert_scales_by_block(model: onnx_ir.Model) -> None:
    """The HTP truncates sums of products with a 4-bit weight of one scale per channel."""
    weights = [
        node.inputs[1].producer()
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm") and node.inputs[1].producer() is not None
    ]
    four_bits = [w for w in weights if w.inputs[0].dtype == onnx_ir.DataType.INT4]
    assert len(four_bits) >= 8
    for weight in four_bits:
        size = weight.attributes["block_size"].value
        inputs, outputs = weight.inputs[0].shape
        assert list(weight.inputs[1].shape) == [inputs // size, outputs]


def test_the_simulation_quantizes_keys_and_values_as_the_cache_does() -> None:
    """The same grid where a model splits keys off a joint projection, without a cache too."""
    model = make("GPT-2")
    quantize_(model, "w8-channel", solver="rtn")
    simulation = simulate(model, inputs("GPT-2"), Schemes(key_value_bitwidth=8))
    simulation.calibrate([{"input_ids": TEXT}])
    eight = [name for name, e in simulation.encodings.items() if e.scheme == Scheme(8)]
    assert eight == [f"transformer.h.{n}.attn.split_{part}" for n in range(2) for part in (1, 2)]


@pytest.mark.slow
def test_graphs_that_an_npu_does_not_take_are_refused() -> None:
    usual = simulated("Llama", Schemes(key_value_bitwidth=8))
    with pytest.raises(CalibrationError, match=r"layers.0 \(add\).*quantize_residual_adds=True"):
        npu_graph(usual, CacheSizes(4, 8))
    experts = make("Qwen3-MoE")
    quantize_(experts, "w8-channel", solver="rtn")
    simulation = simulate(experts, inputs("Qwen3-MoE"), SCHEMES)
    simulation.calibrate([{"input_ids": TEXT}])
    with pytest.raises(CaptureError, match=r"layers.0.mlp.gate \(topk\) computes int64"):
        npu_graph(simulation, CacheSizes(4, 8))
