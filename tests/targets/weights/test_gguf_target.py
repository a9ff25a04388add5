"""The gguf target: bases and adapters of every family, read back and in llama.cpp."""

import re
from collections.abc import Callable
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
from formats.gguf_models import metadata_of, stored_shapes, write_file
from qwlora import fingerprint, quantize_, save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError, QwloraWarning
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.model_source import load_model
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import pack_at_, packed_weights
from qwlora.quantize.rotation import rotate_
from qwlora.targets.proof.contents import check_contents
from qwlora.targets.proof.reference import logits_of, make_reference
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from qwlora.targets.weights.gguf import ADAPTER, BASE
from simulation.tiny_architectures import DECODER, GEMMA3, with_large_weights
from targets.proofs import verify_weights
from targets.weights.bundles import pack_linears, write_adapter, write_base

pytestmark = pytest.mark.filterwarnings("ignore:some weights had been quantized before")
BACKEND = TARGETS["gguf"].backend
HEADS = 4


def gguf_of(architecture: str, folder: Path, kind: Callable[[str], str], **changes: int) -> Path:
    """A file of a tiny model, with matrices of a kind of block."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": 2}
    sizes |= {"max_position_embeddings": 128, **changes}
    kinds = {"llama": t.LlamaConfig, "qwen2": t.Qwen2Config, "gemma3": t.Gemma3TextConfig}
    config: Any = kinds[architecture](**sizes, tie_word_embeddings=True)
    config.head_dim = config.hidden_size // HEADS
    return write_file(
        folder / "tiny.gguf",
        architecture,
        {**metadata_of(architecture, config, architecture), "tokenizer.ggml.model": "no_vocab"},
        stored_shapes(architecture, config),
        lambda name, shape: kind(name) if len(shape) > 1 else "F32",
        tokens=config.vocab_size,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of one layer, with matrices of blocks and a float embedding."""
    kind_of = lambda name: "Q4_0" if name.startswith("blk") else "F32"  # noqa: E731
    return gguf_of("llama", tmp_path_factory.mktemp("gguf"), kind_of)


def in_the_files_order(weight: np.ndarray, heads: int | None) -> np.ndarray:
    """llama.cpp's order of the rows of q and k, by the formula of its converter."""
    if heads is None:
        return weight
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def dequantized(tensor: Any) -> np.ndarray:
    """By the package of llama.cpp."""
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


def test_integers_of_a_gguf_file_are_that_file(source: Path, tmp_path: Path) -> None:
    model = load_precomputed(open_checkpoint(source))
    with pytest.raises(ExportError, match=r"no tokenizer\.json.*gguf_file"):
        BACKEND.write_base(ExportedBase(model, None), tmp_path)
    BACKEND.write_base(ExportedBase(model, None, source), tmp_path)
    assert (tmp_path / BASE).read_bytes() == source.read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_floats_that_are_not_the_files_are_written(architecture: str, tmp_path: Path) -> None:
    """As tuning leaves them: norms (Gemma's are stored with 1 added), biases, an embedding of
    integers that is float now. All others keep their bytes."""
    source = gguf_of(architecture, tmp_path, lambda name: "Q8_0", num_hidden_layers=2)
    checkpoint = GgufCheckpoint(source)
    model: Any = type(checkpoint.model)(checkpoint.config).eval()
    model.load_state_dict(load_model(str(source)).state_dict(), strict=False)
    packed = load_precomputed(open_checkpoint(source))
    for name, layer in packed_weights(packed).items():
        if ".layers." in name:
            pack_at_(model, name, layer.quantized)
    floats = [name for name, p in model.named_parameters() if p.is_floating_point()]
    changed = {*floats[::2]}
    for name in changed:
        values = model.get_parameter(name).data
        values.add_(torch.randn_like(values) / 20)
    assert "model.embed_tokens.weight" in changed
    BACKEND.write_base(ExportedBase(model, None, source), tmp_path)
    again = GgufCheckpoint(tmp_path / BASE)
    for name, values in model.named_parameters():
        if values.is_floating_point():
            found = again.read(name)
            numbers = found.dequantize() if isinstance(found, QuantizedTensor) else found
            torch.testing.assert_close(numbers, values.detach(), rtol=2**-22, atol=2**-22)
    touched = {stored for name in changed for stored in again.stored_names(name)}
    before, after = (
        {t.name: (t.tensor_type, t.data.tobytes()) for t in gguf.GGUFReader(path).tensors}
        for path in (source, tmp_path / BASE)
    )
    assert {name for name in before if before[name] != after[name]} == touched


def test_a_rotated_base_of_a_gguf_file_is_written_whole(source: Path, tmp_path: Path) -> None:
    """Its norms are 1, its embedding is rotated, and its head is no longer tied."""
    model: Any = load_model(str(source))
    with torch.no_grad():  # scales below 6e-5 lose bits in float16
        for parameter in model.parameters():
            parameter.mul_(32 if parameter.ndim > 1 else 1)
    rotate_(model, {"input_ids": torch.arange(12)[None]})
    quantize_(model, "w4-block32", "search")
    BACKEND.write_base(ExportedBase(model, None, source), tmp_path)
    again = load_precomputed(open_checkpoint(tmp_path / BASE))
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.client
def test_llama_cpps_gelu_is_allowed_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = t.Gemma3TextConfig(**GEMMA3, query_pre_attn_scalar=16)
    model: Any = with_large_weights(t.Gemma3ForCausalLM(config))
    quantize_(model, "w4-block32", "search")
    write_base(BACKEND, model, tmp_path)
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
    first = ids[:, :1]  # later tokens see differences of earlier ones, enlarged
    logits = TARGETS["gguf"].open(tmp_path).logits(first)
    table = BACKEND.rounding(model)
    assert table is not None
    with torch.no_grad():
        exact = model(input_ids=first).logits
        with table:
            rounded = model(input_ids=first).logits
        assert torch.equal(model(input_ids=first).logits, exact)  # closed again
    assert (logits - rounded).abs().max() < 0.1 * (logits - exact).abs().max()
    adapted = adapted_model(model, 4, tmp_path / "trained/a")
    write_adapter(BACKEND, tmp_path, "a")
    runtime, sequences = TARGETS["gguf"].open(tmp_path), as_sequences(ids)
    parity = verify_weights(runtime, adapted, tmp_path / "a", sequences, BACKEND.rounding(adapted))
    assert parity.problems == []
    rounded = logits_of(adapted, BACKEND.rounding(adapted))
    reference = make_reference(logits_of(adapted), sequences, rounded=rounded)
    assert 0 < reference["adapter.rounding"].max() < 1e-3 * reference["adapter.largest"].max()
    adapted.base_model.model.model.norm.register_forward_hook(lambda norm, inputs, y: 1.002 * y)
    wrong = verify_weights(runtime, adapted, tmp_path / "a", sequences, BACKEND.rounding(adapted))
    assert any("with the adapter" in problem for problem in wrong.problems)
    (tmp_path / "a" / ADAPTER).write_bytes(b"GGUF and nothing else")
    with pytest.raises(ExportError, match=r"adapter\.gguf.*GGUF"):
        TARGETS["gguf"].open(tmp_path).use(tmp_path / "a")


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


def gemma3(rotation: dict[str, Any]) -> t.PretrainedConfig:
    rotations = {"full_attention": rotation, "sliding_attention": LOCAL}
    return t.Gemma3TextConfig(**GEMMA, **WINDOWS, rope_parameters=rotations)


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
    "gemma3": gemma3(WHOLE),
    "phi3": t.Phi3Config(**SIZES),
    "smollm3": t.SmolLM3Config(**{**SIZES, "num_hidden_layers": 4}),
}
OTHERS: dict[str, t.PretrainedConfig] = {
    "llama, biases": t.LlamaConfig(**HEAD, attention_bias=True, mlp_bias=True),
    "llama3": t.LlamaConfig(**SIZES, rope_parameters=dict(LLAMA3)),
    "qwen2, yarn": t.Qwen2Config(**SIZES, rope_parameters=dict(YARN)),
    "gemma3, linear": gemma3(LINEAR),
    "phi3, short": long_texts(512),
    "phi3, long": long_texts(16),
}
PART = {"rope_theta": 5e3, "rope_type": "default", "partial_rotary_factor": 0.25}
SIX = t.Gemma3TextConfig(  # mlx-lm asks for the sixth layer, the first with full attention
    **{**GEMMA, "num_hidden_layers": 6},
    rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL},
)
OF_MLX = {"phi, part": t.PhiConfig(**SIZES, rope_parameters=PART), "gemma3, windows": SIX}
OF_MLX["phi3, long"] = OTHERS["phi3, long"]


def random_model(config: t.PretrainedConfig, scheme: str = "w4-block32") -> Any:
    """A random model on a grid, whose norms and biases matter."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape).bfloat16().float())
    model = with_large_weights(model)
    pack_linears(model, cycle([parse_scheme(scheme)]), half=True)
    return model


def adapted_model(model: Any, rank: int, folder: Path) -> Any:
    """An adapter on all layers; one of them has another rank."""
    paths = [path for path, _ in model.named_modules() if path.endswith("_proj")]
    torch.manual_seed(rank)
    settings = {"rank_pattern": {r".*\.0\..*(o|v)_proj": 3}, "init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=paths, **settings)).eval()
    save_adapter(adapted, folder)
    return adapted


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_comes_back_from_its_file(family: str, tmp_path: Path) -> None:
    config: Any = FAMILIES[family]
    model = random_model(config)
    write_base(BACKEND, model, tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "base" / BASE).tensors}
    assert ("output.weight" in stored) != config.tie_word_embeddings
    heads: dict[str, tuple[str, int | None]] = {"attn_output": ("o", None)}
    if family in ("llama", "mistral", "smollm3"):
        heads["attn_q"] = ("q", config.num_attention_heads)
    for name, (layer, count) in heads.items():
        weight = packed_weights(model)[f"model.layers.1.self_attn.{layer}_proj.weight"]
        expected = in_the_files_order(weight.tensor.dequantize().numpy(), count)
        np.testing.assert_array_equal(dequantized(stored[f"blk.1.{name}.weight"]), expected)
    norm = model.model.layers[1].input_layernorm.weight.detach() + family.startswith("gemma")
    np.testing.assert_array_equal(stored["blk.1.attn_norm.weight"].data, norm.numpy())
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


def test_floats_become_short(tmp_path: Path) -> None:
    model = random_model(FAMILIES["qwen2"], "w8-block64")
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embedding.copy_((2.0**30 * embedding).bfloat16())  # too large for float16
    head.copy_(head.half())
    write_base(BACKEND, model, tmp_path)
    file = tmp_path / "base" / BASE
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"
    assert (kinds["token_embd.weight"], kinds["output.weight"]) == ("BF16", "F16")
    again = load_precomputed(open_checkpoint(file))
    assert torch.equal(again.model.embed_tokens.weight, embedding)


def test_an_adapter_has_the_names_and_the_order_of_its_base(tmp_path: Path) -> None:
    model = random_model(FAMILIES["llama"])
    write_base(BACKEND, model, tmp_path)
    adapted_model(model, 4, tmp_path / "trained/a")
    canonical = write_adapter(BACKEND, tmp_path, "a")
    reader = gguf.GGUFReader(tmp_path / "a" / ADAPTER)
    said = {"general.type": "adapter", "adapter.type": "lora"}
    said["qwlora.base_fingerprint"] = str(canonical.base_fingerprint)
    assert {key: reader.fields[key].contents() for key in said} == said
    assert "adapter.lora.alpha" not in reader.fields  # the scale is in lora_b
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(stored) == 2 * len(canonical.factors)
    for layer, heads in (("q", 4), ("k", 2)):
        a, b = canonical.factors[f"model.layers.1.self_attn.{layer}_proj"]
        name = f"blk.1.attn_{layer}.weight"
        np.testing.assert_array_equal(stored[f"{name}.lora_a"], a.numpy())
        expected = in_the_files_order(b.numpy(), heads)
        np.testing.assert_array_equal(stored[f"{name}.lora_b"], expected)
    assert stored["blk.0.attn_output.weight.lora_a"].shape == (3, 128)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (t.Gemma3Config(), "this model is gemma3"),
        (t.OPTConfig(), "supports mistral.*this model is opt.*GGUF file"),
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
    model = random_model(t.MistralConfig(**SIZES, sliding_window=64))
    with pytest.warns(QwloraWarning, match=r"last 64 tokens"):
        write_base(BACKEND, model, tmp_path)


@pytest.mark.client
@pytest.mark.parametrize(
    ("target", "config"),
    [("gguf", config) for config in [*FAMILIES.values(), *OTHERS.values()]]
    + [("mlx", config) for config in OF_MLX.values()],
    ids=[*(f"gguf, {name}" for name in FAMILIES | OTHERS), *(f"mlx, {name}" for name in OF_MLX)],
)
def test_the_runtime_computes_a_family_and_its_adapters(
    target: str, config: t.PretrainedConfig, tmp_path: Path
) -> None:
    model, backend = random_model(config), TARGETS[target].backend
    write_base(backend, model, tmp_path)
    files = [path.name for path in (tmp_path / "base").iterdir()]
    check_contents(backend.contents, tmp_path / "base", files, is_base=True)
    runtime = TARGETS[target].open(tmp_path)
    ids = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(1))
    for rank in (2, 5):
        adapted = adapted_model(model, rank, tmp_path / "trained/a")
        write_adapter(backend, tmp_path, "a")
        (tmp_path / "a").rename(tmp_path / str(rank))
        rounding = backend.rounding(adapted)
        parity = verify_weights(runtime, adapted, tmp_path / str(rank), as_sequences(ids), rounding)
        assert parity.problems == []
        model = adapted.unload()
