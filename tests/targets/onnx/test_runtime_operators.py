"""Attentions, norms and activation functions as operators of ONNX Runtime."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers as t
from torch import Tensor

from qwlora import LayerRule, Scheme, quantize_
from qwlora.errors import QwloraWarning
from qwlora.grid.scheme import PerBlock
from qwlora.targets.onnx.onnx_model import base_graph, save_graph
from qwlora.targets.onnx.switchable_graph import fast_, switchable_graph
from qwlora.targets.rounded_floats import EMBEDDINGS, rounded
from qwlora.targets.target import ExportedBase
from simulation.tiny_architectures import DECODER, make, with_large_weights

WIDTH_64 = {**DECODER, "hidden_size": 256}  # a quarter of each head is rotated
SOFTCAP = {"head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 5.0}
LAYERS = ["sliding_attention", "full_attention"]
MODELS: dict[str, Any] = {
    **{name: lambda name=name: make(name) for name in ("Llama", "GPT-2", "OPT", "Qwen2", "Qwen3")},
    **{name: lambda name=name: make(name) for name in ("Gemma 3", "Phi-3", "Mixtral", "GPT-NeoX")},
    "StableLM": lambda: t.StableLmForCausalLM(t.StableLmConfig(**WIDTH_64)),
    "Mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER, sliding_window=7)),
    "Gemma 2": lambda: t.Gemma2ForCausalLM(
        t.Gemma2Config(**DECODER, **SOFTCAP, layer_types=LAYERS)
    ),
}
EXPERTS = {**DECODER, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1}
OTHERS: dict[str, Any] = {  # biases of distances; a softmax with one more value
    "BLOOM": lambda: t.BloomForCausalLM(
        t.BloomConfig(hidden_size=64, n_layer=1, n_head=4, vocab_size=260)
    ),
    "GPT-OSS": lambda: t.GptOssForCausalLM(t.GptOssConfig(**EXPERTS)),
}


def saved(graph: Any, folder: Path) -> Path:
    save_graph(graph, folder / "model.onnx")
    return folder / "model.onnx"


def in_onnx_runtime(file: Path, ids: Tensor, first: int) -> Tensor:
    """Logits of a text: of its `first` tokens together, then one by one with the cache."""
    session = onnxruntime.InferenceSession(file)
    shapes = {value.name: value.shape for value in session.get_inputs()}
    cache = {
        name: np.zeros((1, shape[1], 0, shape[3]), np.float32)
        for name, shape in shapes.items()
        if name.startswith("past")
    }
    outputs, parts = [value.name for value in session.get_outputs()], list[Any]()
    for start, end in [(0, first), *((k, k + 1) for k in range(first, ids.shape[1]))]:
        feeds = {
            "input_ids": ids[:, start:end].numpy(),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(start, end)[None],
        }
        feeds = {name: value for name, value in feeds.items() if name in shapes}
        found = dict(zip(outputs, session.run(None, feeds | cache), strict=True))
        parts.append(torch.from_numpy(found.pop("logits")))
        cache = {name.replace("present", "past_key_values"): v for name, v in found.items()}
    return torch.cat(parts, 1)


QUICK = ("Qwen3", "StableLM", "Gemma 2", "GPT-OSS")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in (*MODELS, *OTHERS)
    ],
)
def test_graphs_compute_what_the_model_computes(name: str, tmp_path: Path) -> None:
    """Windows of 6 to 8 tokens are full before the first tokens end."""
    model = with_large_weights((MODELS | OTHERS)[name]()).eval()
    graph = base_graph(model, getattr(model.config, "max_position_embeddings", 128))
    operators = Counter(node.op_type for node in graph.graph)
    layers = model.config.num_hidden_layers
    assert operators["GroupQueryAttention"] == (layers if name in MODELS else 0)
    assert not operators["Softmax"] or name in {"Mixtral", *OTHERS}
    ids = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    found = in_onnx_runtime(saved(graph, tmp_path), ids, first=15)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("scheme", ["w8-channel", "w8-block32-asymmetric", "w4-signed32"])
def test_the_fast_graph_rounds_activations_of_the_same_integers(
    scheme: str, tmp_path: Path
) -> None:
    model = with_large_weights(make("Qwen3", layers=1)).eval()
    rules = [LayerRule("*k_proj", Scheme(4, symmetric=False, granularity=PerBlock(32)))]
    quantize_(model, scheme, "rtn", rules=rules)
    ids = torch.randint(0, 128, (1, 24), generator=torch.Generator().manual_seed(1))
    with rounded(model, [EMBEDDINGS]), torch.no_grad():
        expected = model(ids).logits
        graph = switchable_graph(ExportedBase(model, None, embedding_bits=8))
    exact = in_onnx_runtime(saved(graph, tmp_path), ids, first=15)
    assert (exact - expected).abs().max() < 1e-5 * expected.abs().max()
    fast_(graph)
    operators = Counter(node.op_type for node in graph.graph)
    # The head, o, down; gate and up, q and v in one each; k, whose grid is another.
    assert (operators["MatMulNBits"], operators["Split"]) == (6, 2)
    assert operators["GatherBlockQuantized"] == 1
    found = in_onnx_runtime(saved(graph, tmp_path), ids, first=15)
    assert 1e-4 < (found - expected).abs().max() / expected.abs().max() < 0.05


def test_a_model_whose_attention_has_no_operator_is_named() -> None:
    quantize_(model := OTHERS["BLOOM"]().eval(), "w4-block32", "rtn")
    with pytest.warns(QwloraWarning, match="no operator for the attention of bloom"):
        switchable_graph(ExportedBase(model, None))


def test_programs_are_not_traced_again_to_translate_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx does so for nine tenths of its time."""
    monkeypatch.delattr(torch.export.ExportedProgram, "run_decompositions")
    assert len(base_graph(make("Llama", layers=1).eval()).graph) > 100
