"""Graphs with a key-value cache on the encodings of a simulation of whole sequences."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from qwlora import quantize_, simulate
from qwlora.errors import CaptureError
from qwlora.graph.capture import Captured
from qwlora.simulation.adapter_simulations import simulate_adapters
from qwlora.simulation.kv_cache_graph import CacheSizes, cached_graph, capture_cached
from qwlora.simulation.simulation import Simulation
from qwlora.targets.onnx.onnx import export_onnx
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from simulation.tiny_architectures import inputs, make

TOKENS, FIRST = 14, 9
IDS = torch.randint(3, 256, (1, TOKENS), generator=torch.Generator().manual_seed(7))
OTHERS = ("GPT-2", "Gemma 3", "Phi-3", "Qwen3")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


def simulated(name: str) -> Simulation:
    model = make(name, layers=1 if name == "Llama" else None)
    quantize_(model, "w4-block32", solver="rtn")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    simulation = simulate(get_peft_model(model, config).eval(), inputs(name))
    simulation.calibrate([{"input_ids": IDS}])
    return simulation


def rounding_of(simulation: Simulation) -> float:
    """How far float32 alone moves its logits."""
    perturbed = simulation.perturbed_outputs({"input_ids": IDS})["logits"]
    return float((perturbed - simulation.logits(IDS)).abs().max())


def call(captured: Captured, first: int, past: list[Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Inputs of a graph of any size for `ids` after `first` tokens."""
    arguments = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, first + ids.shape[1], dtype=torch.int64),
        "position_ids": torch.arange(first, first + ids.shape[1])[None],
    }
    layers = range(len(captured.interface.cached) // 2)
    names = [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]
    return {**arguments, **dict(zip(names, past, strict=True))}


@pytest.mark.parametrize("name", ["Llama", *SLOW])
def test_prefill_then_decode_in_onnx_runtime_is_the_simulation(name: str, tmp_path: Path) -> None:
    simulation = simulated(name)
    captured = capture_cached(simulation.origin.model)
    assert captured.interface.shapes["attention_mask"] == ("batch", "context")
    graph = cached_graph(simulation, captured)
    plain = simulation.encodings
    assert {n: graph.encodings[n] for n in plain} == plain
    own = {name for name in graph.encodings if name not in plain}
    assert captured.interface.cached <= own
    assert len(own) == 2 * len(captured.interface.cached)  # and what they become with the new ones

    export_onnx(graph, tmp_path)
    session = OnnxModel(tmp_path)
    expected = simulation.logits(IDS)
    floor = rounding_of(simulation)
    shapes = captured.interface.shapes
    past = [torch.zeros(1, shapes[name][1], 0, 16) for name in captured.interface.inputs[3:]]
    found, first = [], 0
    for part in (IDS[:, :FIRST], *IDS[:, FIRST:].split(1, dim=1)):
        outputs = session.run(call(captured, first, past, part))
        found.append(outputs["logits"])
        past = [outputs[name] for name in captured.interface.outputs[1:]]
        first += part.shape[1]
    difference = (torch.cat(found, 1) - expected).abs()
    assert float(difference.max()) <= 2 * floor + 1e-4, (float(difference.max()), floor)
    assert torch.equal(torch.cat(found, 1).argmax(-1), expected.argmax(-1))


@pytest.mark.slow
def test_static_graphs_return_new_keys_and_values_only() -> None:
    """Valid tokens on the right of a static cache: the sequence's logits, windows included."""
    name, context = "Gemma 3", 24  # a layer of it sees 8 tokens only
    model = make(name)
    quantize_(model, "w4-block32", solver="rtn")
    plain = simulate(model, inputs(name))
    plain.calibrate([{"input_ids": IDS}])
    expected = plain.logits(IDS)
    floor = rounding_of(plain)
    graphs = {}
    for tokens in (FIRST, 1):
        captured = capture_cached(model, CacheSizes(tokens, context))
        assert captured.interface.shapes["present.1.value"] == (1, 2, tokens, 16)
        assert captured.interface.shapes["past_key_values.1.value"] == (1, 2, context - tokens, 16)
        graphs[tokens] = Simulation(captured, plain.origin)
        known = cached_graph(plain, captured).encodings
        graphs[tokens].restore({mark.name: known[mark.name] for mark in graphs[tokens].marks})
    window = [torch.zeros(1, 2, context, 16) for _ in range(4)]
    found, first = [], 0
    for tokens in (FIRST, *[1] * (TOKENS - FIRST)):
        graph, ids = graphs[tokens], IDS[:, first : first + tokens]
        mask = torch.zeros(1, context, dtype=torch.int64)
        mask[:, context - tokens - first :] = 1
        cut = [past[:, :, tokens - context :] for past in window]
        arguments = call(graph.captured, 0, cut, ids) | {"attention_mask": mask}
        arguments["position_ids"] = torch.arange(first, first + tokens)[None]
        with torch.no_grad():
            outputs = graph.captured.named(graph.graph_module(*arguments.values()))
        found.append(outputs["logits"])
        new = [outputs[output] for output in graph.captured.interface.outputs[1:]]
        window = [torch.cat([past, own], 2) for past, own in zip(window, new, strict=True)]
        first += tokens
    difference = float((torch.cat(found, 1) - expected).abs().max())
    assert difference <= 2 * floor + 1e-4, (difference, floor)


def test_one_capture_serves_every_adapter_of_a_structure() -> None:
    model = make("Llama", layers=1)
    quantize_(model, "w4-block32", solver="rtn")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name="first")
    adapted.add_adapter("second", config)
    adapted.eval().set_adapter("second")
    simulations = simulate_adapters(adapted, inputs("Llama"))
    simulations.calibrate([{"input_ids": IDS}])
    captured = capture_cached(adapted, CacheSizes(4, 8))
    for name, simulation in simulations.items():
        graph = cached_graph(simulation, captured)
        path = "base_model.model.model.layers.0.self_attn.q_proj.lora_B"
        weights = adapted.get_submodule(path)
        expected = torch.zeros(64, 2) if name == "base" else weights[name].weight
        assert torch.equal(graph.program.state_dict[f"model.{path}.second.weight"], expected)


class Recurrent(nn.Module):
    """A model with a state that is not a cache."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> dict[str, Any]:
        return {"logits": torch.zeros(*input_ids.shape, 8), "cache_params": [input_ids]}


def test_models_without_keys_and_values_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"Recurrent returns no past_key_values.*without one"):
        capture_cached(Recurrent())
    with pytest.raises(CaptureError, match="BertForSequenceClassification returns no"):
        capture_cached(make("BERT, classification"))
    sizes = {"vocab_size": 64, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    with pytest.raises(CaptureError, match="past_key_values"):
        capture_cached(t.MambaForCausalLM(t.MambaConfig(**sizes)).eval())
    with pytest.raises(CaptureError, match="8 tokens in a context of 8"):
        CacheSizes(8, 8)
