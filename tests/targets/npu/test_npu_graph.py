"""Graphs for an NPU: what the host computes, and that prefill and decode are the simulation."""

from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from qwlora import LayerRule, Scheme, Schemes, quantize_, simulate
from qwlora.errors import CalibrationError, CaptureError
from qwlora.simulation.kv_cache_graph import CacheSizes
from qwlora.simulation.simulation import Simulation
from qwlora.targets.npu.device_graph import run_host, scaling_of
from qwlora.targets.npu.htp_rewrites import npu_onnx
from qwlora.targets.npu.npu_graph import NpuGraph, host_arguments, npu_graph
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
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


def simulated(name: str, schemes: Schemes = SCHEMES) -> Simulation:
    model = make(name)
    embeddings = {"GPT-2": ["*wte", "*wpe"], "GPT-NeoX": ["*embed_in"], "OPT": ["*embed_*"]}
    rules = [LayerRule(n, Scheme(8)) for n in embeddings.get(name, ["*embed_tokens"])]
    quantize_(model, "w4-channel", solver="rtn", rules=rules)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    simulation = simulate(get_peft_model(model, config).eval(), inputs(name), schemes)
    simulation.calibrate([{"input_ids": TEXT}])
    return simulation


class OnCpu:
    """A graph with its adapter in ONNX Runtime, without optimizations."""

    def __init__(self, graph: NpuGraph, scaling: float | None, folder: Path):
        model, codes = npu_onnx(graph.device, {})
        onnx_ir.save(model, folder / "model.onnx")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.graph, self.fixed = graph, {**codes, "lora_alpha": np.float32([scaling])}
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )

    def run(self, past: int, cache: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        room = self.graph.sizes.past
        arguments = host_arguments(self.graph.sizes, past, self.graph.sizes.tokens)
        given = {"input_ids": ids.to(torch.int32), **run_host(self.graph.host, *arguments)}
        given |= {name: value[:, :, value.shape[2] - room :] for name, value in cache.items()}
        names = [output.name for output in self.session.get_outputs()]
        feed = {name: value.numpy() for name, value in given.items()} | self.fixed
        taken = {i.name for i in self.session.get_inputs()}
        found = self.session.run(names, {name: feed[name] for name in taken})
        return dict(zip(names, map(torch.from_numpy, found), strict=True))


@pytest.mark.slow  # targets/npu/test_qairt.py does the same with adapters in the fast lane
@pytest.mark.parametrize("name", ["Llama", *SLOW])
def test_prefill_then_decode_is_the_simulation(name: str, tmp_path: Path) -> None:
    simulation = simulated(name)
    graphs = {}
    for tokens in (FIRST, 1):
        (tmp_path / str(tokens)).mkdir()
        graph = npu_graph(simulation, CacheSizes(tokens, CONTEXT))
        assert graph.host.interface.shapes["token_mask"] == (1, CONTEXT)
        scaling = scaling_of(simulation.program)
        graphs[tokens] = OnCpu(graph, scaling, tmp_path / str(tokens))
    prefill, decode = (graphs[tokens].graph.device for tokens in (FIRST, 1))
    shared = prefill.encodings.keys() & decode.encodings.keys()
    assert shared == prefill.encodings.keys()
    for each in shared:  # one grid for a tensor in all graphs
        assert torch.equal(prefill.encodings[each].scale, decode.encodings[each].scale), each
    for each in decode.interface.cached:
        assert prefill.encodings[each].scheme == Scheme(8)
    assert_scales_by_block(onnx_ir.load(tmp_path / "1" / "model.onnx"))
    taken = {i.name: i.type for i in graphs[1].session.get_inputs()}
    assert {n for n, kind in taken.items() if "float" not in kind} == {
        *(n for n in taken if n.endswith(("lora_A.weight.codes", "lora_B.weight.codes"))),
        *(n for n in taken if n in ("input_ids", "position_ids")),
    }

    expected = simulation.logits(TEXT)
    shapes = decode.interface.shapes
    cache = {n: torch.zeros(1, shapes[n][1], CONTEXT, 16) for n in decode.interface.cached}
    found, first = [], 0
    for tokens in (FIRST, *[1] * (TOKENS - FIRST)):
        outputs = graphs[tokens].run(first, cache, TEXT[:, first : first + tokens])
        found.append(outputs.pop("logits"))
        for output, new in outputs.items():
            into = output.replace("_out", "_in")
            cache[into] = torch.cat([cache[into], new], 2)[:, :, -CONTEXT:]
        first += tokens
    logits = torch.cat(found, 1)
    # cosines, sines, masked scores and sums with a bias have 16-bit grids in the graph alone, and a
    # rounding of theirs may move a key or value by one of its 255 steps
    assert sqnr(logits, expected) > 40, sqnr(logits, expected)
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
