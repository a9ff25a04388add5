"""Files of `export.embedding_bits` 8: which floats are rounded and how, and what runtimes compute."""

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
from qwlora.formats import manifest
from qwlora.targets.proof.folder import RECORD
from qwlora.targets.rounded_floats import EMBEDDINGS, FACTORS, rounded
from targets.client_programs import with_clients

IDS = torch.randint(0, 250, (2, 24), generator=torch.Generator().manual_seed(3))
TYPES = gguf.GGMLQuantizationType
SCALING = 7 / 3**0.5
HEADS = pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # tied, and of its own


def trained(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-trained")


def adapted(folder: Path, architecture: str) -> Any:
    """A base with an adapter, also on a head of its own, saved next to `folder`."""
    model = tiny_model(architecture, layers=1)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[0, :32], layer.weight[1, 0] = 0, 3.0
    quantize_(model, "w4-block32", "search")
    modules = ["q_proj", "up_proj", *["lm_head"] * (architecture == "qwen3")]
    config = LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=modules)
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config, "first").eval()
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter) / 8
    save_adapter(peft_model, trained(folder), adapter="first")
    return peft_model


def exported(target: str, folder: Path, architecture: str, **options: Any) -> tuple[Any, Any]:
    """The record of the base, and what was exported."""
    base = adapted(folder, architecture).unload()
    before, adapters = fingerprint(base), {"first": trained(folder)}
    export(base, target, folder, adapters, byte_tokenizer(), **options)
    record = json.loads((folder / "base" / RECORD).read_text())
    assert record["base_fingerprint"] == before == fingerprint(base)
    return record, adapted(folder, architecture)


def types(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(file).tensors}


@HEADS
def test_floats_are_rounded_inside_the_block_only(architecture: str, tmp_path: Path) -> None:
    model = adapted(tmp_path, architecture)
    inner, layer = model.get_base_model(), model.get_base_model().model.layers[0].mlp.up_proj
    table, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weight, b = table.weight.detach().clone(), layer.lora_B["first"].weight.detach().clone()
    with rounded(model, [EMBEDDINGS, FACTORS]) as done:
        assert done == [EMBEDDINGS, FACTORS]
        values = inner.get_input_embeddings()(torch.arange(len(weight)))
        blocks, off = (x.view(len(weight), -1, 32).abs() for x in (weight, values - weight))
        share = off / (blocks.amax(-1, keepdim=True) / 127).half().float()
        assert 0.4 < float(share.nan_to_num().max()) <= 0.5001
        assert not bool(values[0, :32].any())
        packed_head = inner.get_output_embeddings()
        packed_head = getattr(packed_head, "base_layer", packed_head)
        assert packed_head.is_tied == (architecture == "llama")
        factor, expected = layer.lora_B["first"].weight, (b * SCALING).half().float()
        torch.testing.assert_close(factor * SCALING, expected, rtol=1e-6, atol=0)
    assert (inner.get_input_embeddings(), inner.get_output_embeddings()) == (table, head)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@HEADS
def test_a_gguf_file_holds_8_bits_and_adapters_16(architecture: str, tmp_path: Path) -> None:
    record, model = exported("gguf", tmp_path, architecture)
    assert record["rounded"] == [EMBEDDINGS, FACTORS]
    file, names = tmp_path / "base/base.gguf", ["token_embd.weight"]
    names += ["output.weight"] * (architecture == "qwen3")
    assert [name for name, kind in types(file).items() if kind == TYPES.Q8_0] == names
    assert {*types(tmp_path / "first/adapter.gguf").values()} == {TYPES.F16}
    table = next(t for t in gguf.GGUFReader(file).tensors if t.name == names[0])
    found = torch.from_numpy(gguf.quants.dequantize(table.data, table.tensor_type))
    with rounded(model, [EMBEDDINGS]):
        expected = model.get_base_model().get_input_embeddings()(torch.arange(len(found)))
    assert torch.equal(found, expected)
    # Embeddings of the file that a base came from are copied.
    base, copy = model.unload(), tmp_path / "copy"
    export(base, "gguf", tmp_path / "floats", None, byte_tokenizer(), embedding_bits=32)
    export(base, "gguf", copy, gguf_file=tmp_path / "floats/base/base.gguf")
    assert {*types(copy / "base/base.gguf").values()} == {TYPES.F32, TYPES.Q4_0}
    assert manifest.read(copy / "base" / RECORD)["rounded"] == [FACTORS]


def test_32_bits_round_nothing(tmp_path: Path) -> None:
    record, _ = exported("gguf", tmp_path, "qwen3", embedding_bits=32)
    assert "rounded" not in record
    assert {*types(tmp_path / "first/adapter.gguf").values()} == {TYPES.F32}


def test_an_mlx_folder_holds_8_bits_and_adapters_16(tmp_path: Path) -> None:
    exported("mlx", tmp_path, "llama")
    assert "model.embed_tokens.scales" in load_file(tmp_path / "base/model.safetensors")
    factors = load_file(tmp_path / "first/adapters.safetensors").values()
    assert {factor.dtype for factor in factors} == {torch.float16}


@HEADS
@pytest.mark.parametrize("target", with_clients(["gguf", "mlx"]))
def test_the_runtime_computes_the_rounded_model(
    target: str, architecture: str, tmp_path: Path
) -> None:
    record, model = exported(target, tmp_path, architecture)
    worst = list[float]()
    # References with one kind of rounding alone are farther from the files.
    for what in ([EMBEDDINGS, FACTORS], [EMBEDDINGS], [FACTORS]):
        manifest.write(tmp_path / "base", RECORD, record | {"rounded": what}, [])
        rows = verify(tmp_path, model, IDS)
        assert any("by rounded floats" in row.what for row in rows)
        assert worst or all(row.passed for row in rows), rows
        off = [float(row.value or 0) for row in rows if "of a log-probability" in row.what]
        worst.append(max(off))
    assert min(worst[1:]) > 5 * worst[0]
