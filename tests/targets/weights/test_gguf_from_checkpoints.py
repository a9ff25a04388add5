"""GGUF files of models that came from no GGUF file: every family, read back and in llama.cpp."""

import re
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from conftest import byte_tokenizer
from qwlora import save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import QwloraWarning
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.nn import packed_weights
from qwlora.targets.registry import TARGETS
from qwlora.targets.weights.gguf import ADAPTER, BASE
from simulation.tiny_architectures import DECODER, with_large_weights
from targets.proofs import verify_weights
from targets.weights.bundles import pack_linears, write_adapter, write_base
from targets.weights.test_gguf_target import in_the_files_order

BACKEND = TARGETS["gguf"].backend
W4 = Scheme(4, True, PerBlock(32))
SIZES = {**DECODER, "vocab_size": 264, "hidden_size": 64}
HEAD = {**SIZES, "head_dim": 32}
GEMMA = {**HEAD, "query_pre_attn_scalar": 32, "sliding_window": 8}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
SCALED = {"rope_theta": 5e3, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {**SCALED, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_theta": 5e3, "rope_type": "linear", "factor": 4.0}
YARN = {**SCALED, "rope_type": "yarn"}
WHOLE = {"rope_theta": 5e3, "rope_type": "default"}
LOCAL = {"rope_theta": 1e3, "rope_type": "default"}
LONG = {"rope_type": "longrope", "rope_theta": 5e3, "factor": 8.0}
LONG |= {"short_factor": [1 + i / 4 for i in range(8)], "long_factor": [1.0 + i for i in range(8)]}


def long_texts(original: int) -> t.PretrainedConfig:
    """Both take the long factors if there is room for more tokens than there were originally."""
    lengths = {"original_max_position_embeddings": original}
    sizes = {**SIZES, **lengths, "max_position_embeddings": 8 * original}
    return t.Phi3Config(**sizes, rope_parameters={**LONG, **lengths})


FAMILIES: dict[str, t.PretrainedConfig] = {
    "llama": t.LlamaConfig(**HEAD),
    "mistral": t.MistralConfig(**SIZES, sliding_window=None, tie_word_embeddings=True),
    "qwen2": t.Qwen2Config(**SIZES),
    "qwen3": t.Qwen3Config(**HEAD, tie_word_embeddings=True),
    "gemma2": t.Gemma2Config(**GEMMA, **WINDOWS),
    "gemma3": t.Gemma3TextConfig(
        **GEMMA, **WINDOWS, rope_parameters={"full_attention": WHOLE, "sliding_attention": LOCAL}
    ),
    "phi3": t.Phi3Config(**SIZES),
    "smollm3": t.SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
}
OTHERS: dict[str, t.PretrainedConfig] = {
    "llama, biases": t.LlamaConfig(**HEAD, attention_bias=True, mlp_bias=True),
    "llama3": t.LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)),
    "qwen2, yarn": t.Qwen2Config(**SIZES, rope_parameters=dict(YARN)),
    "gemma3, linear": t.Gemma3TextConfig(
        **GEMMA, **WINDOWS, rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL}
    ),
    "phi3, short": long_texts(512),
    "phi3, long": long_texts(16),
}


def quantized(config: t.PretrainedConfig, scheme: Scheme = W4) -> Any:
    """A random model on a grid, whose norms and biases matter."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape).bfloat16().float())
    model = with_large_weights(model)
    pack_linears(model, cycle([scheme]), half=True)
    return model


def with_adapter(model: Any, rank: int, folder: Path) -> Any:
    """An adapter on all layers; one of them has another rank."""
    paths = [path for path, _ in model.named_modules() if path.endswith("_proj")]
    torch.manual_seed(rank)
    settings = {"rank_pattern": {r".*\.0\..*o_proj": 3}, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=paths, **settings)).eval()
    save_adapter(adapted, folder)
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_from_its_file(family: str, tmp_path: Path) -> None:
    config: Any = FAMILIES[family]
    model = quantized(config)
    write_base(BACKEND, model, tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "base" / BASE).tensors}
    assert ("output.weight" in stored) != config.tie_word_embeddings
    path = "model.layers.1.self_attn.o_proj.weight"
    found = stored["blk.1.attn_output.weight"]
    values = gguf.quants.dequantize(found.data, found.tensor_type)
    np.testing.assert_array_equal(values, packed_weights(model)[path].tensor.dequantize().numpy())
    norm = model.model.layers[1].input_layernorm.weight.detach() + family.startswith("gemma")
    np.testing.assert_array_equal(stored["blk.1.attn_norm.weight"].data, norm.numpy())
    if family in ("llama", "mistral", "smollm3"):
        q = packed_weights(model)["model.layers.0.self_attn.q_proj.weight"].tensor.dequantize()
        found = stored["blk.0.attn_q.weight"]
        values = gguf.quants.dequantize(found.data, found.tensor_type)
        heads = config.num_attention_heads
        np.testing.assert_array_equal(values, in_the_files_order(q.numpy(), heads))
    if family == "smollm3":  # transformers reads no GGUF files of it
        return
    checkpoint = open_checkpoint(tmp_path / "base" / BASE)
    for name, layer in packed_weights(model).items():
        again = checkpoint.read(name)
        assert isinstance(again, QuantizedTensor)
        assert again.equals(layer.quantized)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(checkpoint.read(name), parameter.detach(), rtol=0, atol=1e-7)
    ids = torch.arange(3, 23).view(1, -1)
    with torch.no_grad():  # and so do the settings of attention
        again, wanted = (m(ids).logits for m in (load_precomputed(checkpoint), model))
    torch.testing.assert_close(again, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        (Scheme(8, True, PerBlock(64)), "Q8_0"),
        (Scheme(4, False, PerBlock(32), float_offset=True), "Q4_1"),
    ],
    ids=str,
)
def test_grids_and_floats_become_short(scheme: Scheme, kind: str, tmp_path: Path) -> None:
    model = quantized(FAMILIES["qwen2"], scheme)
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding.copy_((2.0**30 * embedding).bfloat16())  # too large for float16
    head.copy_(head.half())
    write_base(BACKEND, model, tmp_path)
    file = tmp_path / "base" / BASE
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_up.weight"] == kind
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("BF16", "F16")
    again = load_precomputed(open_checkpoint(file))
    assert torch.equal(again.model.embed_tokens.weight, embedding)
    for name, layer in packed_weights(model).items():
        packed = packed_weights(again)[name]
        assert torch.equal(packed.tensor.dequantize(), layer.tensor.dequantize())


def test_an_adapter_follows_the_order_of_its_base(tmp_path: Path) -> None:
    model = quantized(FAMILIES["llama"])
    write_base(BACKEND, model, tmp_path)
    with_adapter(model, 4, tmp_path / "trained/a")
    canonical = write_adapter(BACKEND, tmp_path, "a")
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "a" / ADAPTER).tensors}
    assert len(stored) == 2 * len(canonical.factors)
    for layer, heads in (("q", 4), ("k", 2), ("v", None)):
        _, b = canonical.factors[f"model.layers.1.self_attn.{layer}_proj"]
        expected = b.numpy() if heads is None else in_the_files_order(b.numpy(), heads)
        np.testing.assert_array_equal(stored[f"blk.1.attn_{layer}.weight.lora_b"], expected)
    assert stored["blk.0.attn_output.weight.lora_a"].shape == (3, 128)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (t.Gemma3Config(), "this is gemma3"),
        (t.OPTConfig(), "model types mistral.*this is opt.*GGUF file"),
        (t.Qwen2Config(hidden_act="gelu"), "this qwen2 model: hidden_act is gelu, not silu"),
        (t.Qwen3Config(attention_bias=True), "attention_bias"),
        (t.Gemma2Config(tie_word_embeddings=False), "tie_word_embeddings"),
        (t.Gemma2Config(query_pre_attn_scalar=144), "query_pre_attn_scalar is 144, not 256"),
        (t.Gemma2Config(attn_logit_softcapping=None), "attn_logit_softcapping or .* is None"),
        (t.Gemma3TextConfig(final_logit_softcapping=30.0), "final_logit_softcapping"),
        (t.Gemma3TextConfig(layer_types=["full_attention"] * 26), "layer_types"),
        (t.SmolLM3Config(no_rope_layer_interval=3), "no_rope_layers"),
        (t.Qwen2Config(rope_parameters=dict(LLAMA3)), "rope_type is llama3"),
        (t.LlamaConfig(rope_parameters={**YARN, "mscale": 1.5}), "rope_type yarn has mscale"),
    ],
)
def test_what_llama_cpp_has_not_is_refused(config: t.PretrainedConfig, problem: str) -> None:
    model: Any = SimpleNamespace(config=config)
    assert re.search(problem, str(BACKEND.model_problem(model, byte_tokenizer())))


def test_a_window_that_llama_cpp_does_not_have_is_said(tmp_path: Path) -> None:
    model = quantized(t.MistralConfig(**SIZES, sliding_window=64))
    with pytest.warns(QwloraWarning, match=r"last 64 tokens, .*differ"):
        write_base(BACKEND, model, tmp_path)


@pytest.mark.client
@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_llama_cpp_computes_a_family_and_its_adapters(name: str, tmp_path: Path) -> None:
    model = quantized((FAMILIES | OTHERS)[name])
    write_base(BACKEND, model, tmp_path)
    runtime = TARGETS["gguf"].open(tmp_path)
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    for rank in (2, 5):
        adapted = with_adapter(model, rank, tmp_path / "trained/a")
        write_adapter(BACKEND, tmp_path, "a")
        (tmp_path / "a").rename(tmp_path / str(rank))
        rounding = BACKEND.rounding(adapted)
        parity = verify_weights(runtime, adapted, tmp_path / str(rank), as_sequences(ids), rounding)
        assert parity.problems == []
        model = adapted.unload()
