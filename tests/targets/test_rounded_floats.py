"""Files of `export.float_bits` 8: which floats are rounded and how, and what runtimes compute."""

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from conftest import byte_tokenizer, tiny_model
from qwlora import export, fingerprint, quantize_, save_adapter, verify
from qwlora.errors import ExportError
from qwlora.formats import manifest
from qwlora.targets.proof.checks import Check
from qwlora.targets.proof.folder import RECORD
from qwlora.targets.rounded_floats import EMBEDDINGS, FACTORS, rounded
from targets.client_programs import with_clients

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))
TYPES = gguf.GGMLQuantizationType


def adapted(folder: Path, architecture: str) -> tuple[Any, Any]:
    """A base and an adapter on it, also of an untied head, with rsLoRA; saved in `folder`."""
    model = tiny_model(architecture, layers=1)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[0, :32], layer.weight[1, 0] = 0, 3.0
    quantize_(model, "w4-block32", "search")
    untied = [] if model.config.tie_word_embeddings else ["lm_head"]
    modules = ["q_proj", "up_proj", *untied]
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=modules)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config, "first").eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 8
    save_adapter(peft_model, folder / "trained", adapter="first")
    return model, peft_model


def exported(target: str, folder: Path, architecture: str, **options: Any) -> tuple[Any, Any]:
    _, peft_model = adapted(folder, architecture)
    saved, before = {"first": folder / "trained"}, fingerprint(peft_model)
    base = peft_model.unload()
    export(base, target, folder / "out", saved, byte_tokenizer(), **options)
    assert fingerprint(base) == before
    again = adapted(folder, architecture)[1]
    return json.loads((folder / "out/base/qwlora.json").read_text()), again


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_floats_are_rounded_inside_the_block_only(architecture: str, tmp_path: Path) -> None:
    _, model = adapted(tmp_path, architecture)
    inner, layer = model.get_base_model(), model.get_base_model().model.layers[0].mlp.up_proj
    table, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight, b = table.weight.detach().clone(), layer.lora_B["first"].weight.detach().clone()
    scaling = 7 / 3**0.5
    with rounded(model, [EMBEDDINGS, FACTORS]) as done:
        assert done == [EMBEDDINGS, FACTORS]
        values = inner.get_input_embeddings()(torch.arange(len(weight)))
        step = (weight.view(len(weight), -1, 32).abs().amax(-1) / 127).half().float()
        off = (values - weight).view(len(weight), -1, 32).abs()
        assert bool((off <= 0.5001 * step.unsqueeze(-1)).all())
        assert bool((off > 0.4 * step.unsqueeze(-1)).any())
        assert bool((values[0, :32] == 0).all())
        packed_head = inner.get_output_embeddings()
        packed_head = getattr(packed_head, "base_layer", packed_head)
        assert packed_head.is_tied == (architecture == "llama")
        factor = layer.lora_B["first"].weight
        torch.testing.assert_close(
            factor * scaling, (b * scaling).half().float(), rtol=1e-6, atol=0
        )
        assert not torch.equal(factor, b)
    assert inner.get_input_embeddings() is table
    assert inner.get_output_embeddings() is head
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with rounded(model, []) as done:
        assert done == []


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_a_gguf_file_holds_8_bits_and_adapters_16(architecture: str, tmp_path: Path) -> None:
    record, model = exported("gguf", tmp_path, architecture)
    assert record["rounded"] == [EMBEDDINGS, FACTORS]
    assert record["base_fingerprint"] == fingerprint(model)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out/base/base.gguf").tensors}
    names = ["token_embd.weight", *["output.weight"] * (architecture == "qwen3")]
    assert [n for n, t in tensors.items() if t.tensor_type == TYPES.Q8_0] == names
    table = tensors["token_embd.weight"]
    found = torch.from_numpy(gguf.quants.dequantize(table.data, table.tensor_type))
    factors = gguf.GGUFReader(tmp_path / "out/first/adapter.gguf").tensors
    assert {t.tensor_type for t in factors} == {TYPES.F16}
    with rounded(model, [EMBEDDINGS]):
        expected = model.get_base_model().get_input_embeddings()(torch.arange(len(found)))
    assert torch.equal(found, expected)


def test_32_bits_round_nothing(tmp_path: Path) -> None:
    record, model = exported("gguf", tmp_path, "qwen3", float_bits=32)
    assert "rounded" not in record
    kinds = {t.tensor_type for t in gguf.GGUFReader(tmp_path / "out/base/base.gguf").tensors}
    assert kinds == {TYPES.F32, TYPES.Q4_0}
    factors = gguf.GGUFReader(tmp_path / "out/first/adapter.gguf").tensors
    assert {t.tensor_type for t in factors} == {TYPES.F32}
    with pytest.raises(ExportError, match=r"mlx has no float_bits 16 .*: 8, 32"):
        export(model, "mlx", tmp_path / "mlx", float_bits=16)


def test_an_mlx_adapter_has_float16(tmp_path: Path) -> None:
    record, _ = exported("mlx", tmp_path, "llama")
    assert record["rounded"] == [EMBEDDINGS, FACTORS]
    base = load_file(tmp_path / "out/base/model.safetensors")
    assert "model.embed_tokens.scales" in base
    factors = load_file(tmp_path / "out/first/adapters.safetensors")
    assert {factor.dtype for factor in factors.values()} == {torch.float16}


def worst_log_prob(rows: list[Check]) -> float:
    return max(float(row.value or 0) for row in rows if "of a log-probability" in row.what)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("target", with_clients(["gguf", "mlx"]))
def test_the_runtime_computes_the_rounded_model(
    target: str, architecture: str, tmp_path: Path
) -> None:
    record, model = exported(target, tmp_path, architecture)
    rows = verify(tmp_path / "out", model, IDS)
    assert [row.what for row in rows if not row.passed] == []
    assert any("by rounded floats" in row.what for row in rows)
    closest = worst_log_prob(rows)
    # A reference without either kind of rounding is farther from the files.
    for what in ([EMBEDDINGS], [FACTORS]):
        record["rounded"] = what
        manifest.write(tmp_path / "out/base", RECORD, record, [])
        assert worst_log_prob(verify(tmp_path / "out", model, IDS)) > 5 * closest, what
