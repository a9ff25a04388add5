"""`qwlora inspect`: sizes, grids and SQNR are right; any other input ends with code 2 and a reason."""

import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetModel
from transformers.pytorch_utils import Conv1D

from cli.command_line import answered, qwlora, refused
from conftest import byte_tokenizer, packed_model, reseal, tiny_model
from formats.models import edit_tensors, gpt2
from qwlora import fingerprint, quantize_, save_adapter, save_base
from qwlora.analysis.inspect_model import inspect_source
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import packed_weights
from qwlora.quantize.layer_rules import LayerRule

GPTQ = Path(__file__).parent.parent / "formats" / "files" / "gptqmodel-llama"
KINDS = (torch.nn.Linear, Conv1D)


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Any]:
    model = tiny_model("llama")
    schemes = {"*.down_proj": "w8-channel", "*.1.mlp.up_proj": "w3-block16-asymmetric"}
    rules = [LayerRule(match, parse_scheme(scheme)) for match, scheme in schemes.items()]
    quantize_(model, "w4-block32", "rtn", rules=rules)
    (tmp_path / "base").mkdir()
    save_base(model, tmp_path / "base", byte_tokenizer(), source="somewhere")
    return tmp_path / "base", model


def data_bytes(file: Path) -> int:
    """What a safetensors file holds besides its header."""
    return file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]


def record_of(*arguments: str | Path) -> dict[str, Any]:
    """The JSON of a source, with its tensors by name."""
    done = qwlora("inspect", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    record: dict[str, Any] = json.loads(done.stdout)
    return record | {"tensors": {tensor["name"]: tensor for tensor in record["tensors"]}}


def decibel(w: torch.Tensor, w_hat: torch.Tensor) -> float:
    signal, noise = w.double().square().sum(), (w - w_hat).double().square().sum()
    return float(10 * torch.log10(signal / noise))


def test_a_base_as_json(base: tuple[Path, Any]) -> None:
    folder, model = base
    record = record_of(folder)
    tensors, packed = record["tensors"], packed_weights(model)
    assert (record["kind"], record["fingerprint"]) == ("QWLoRA base", fingerprint(model))
    assert record["totals"]["all"]["bytes"] == data_bytes(folder / "base.safetensors")
    assert record["totals"]["all"]["weights"] == tiny_model("llama").num_parameters()
    for name, layer in packed.items():
        shown = tensors[name]["grid"], tensors[name]["shape"]
        assert shown == (str(layer.scheme), list(layer.codes.shape))
    # four bits, and a scale of 16 or 32 for each 32 weights
    assert tensors["model.layers.0.mlp.up_proj.weight"]["bits_per_weight"] in (4.5, 5.0)
    assert tensors["model.norm.weight"]["grid"] in ("float16", "float32")
    integers = [t for t in tensors.values() if t["grid"].startswith("int")]
    assert len(integers) == len(packed)
    assert record["totals"]["integers"]["bytes"] == sum(t["bytes"] for t in integers)


def test_a_base_as_text_against_itself(base: tuple[Path, Any]) -> None:
    folder, model = base
    out = answered("inspect", folder, "--against", folder)
    assert f"fingerprint {fingerprint(model)}" in out
    assert out.splitlines()[2].endswith("SQNR dB")
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["model.layers.*.self_attn.q_proj.weight"][1:3] == ["2", "64x64"]
    down, up = (lines[f"model.layers.{n}_proj.weight"] for n in ("*.mlp.down", "1.mlp.up"))
    assert down[3:7] == ["int8", "symmetric", "per", "channel"]
    assert up[3:7] == ["int3", "asymmetric", "per", "block"]
    assert down[-1] == up[-1] == "exact"
    tensors = record_of(folder, "--against", folder)["tensors"].values()
    assert {(t["exact"], t["sqnr_db"]) for t in tensors} == {(True, None)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sqnr_against_the_float_model_is_that_of_a_plain_computation(
    architecture, checkpoints, tmp_path
) -> None:
    """GPT-2 has square weights that are stored the other way round."""
    model, plain = tiny_model(architecture), tiny_model(architecture)
    quantize_(model, "w4-block32", "rtn")
    save_base(model, tmp_path, byte_tokenizer(), source="somewhere")
    inspection = inspect_source(str(tmp_path), against=str(checkpoints[architecture]))
    found = {t.name: t for t in inspection.tensors}
    for name, layer in packed_weights(model).items():
        w = plain.get_parameter(name).detach()
        w = w.T if architecture == "gpt2" and ".c_" in name else w
        expected = decibel(w, layer.quantized.dequantize())
        assert found[name].sqnr_db == pytest.approx(expected, abs=1e-6)
        assert 15 < expected < 35
    assert {t.sqnr_db for t in found.values() if not t.is_integers} == {math.inf}


def test_a_float_checkpoint(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Also of a model that is no language model, which is shown by its headers."""
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
    ResNetModel(config).save_pretrained(tmp_path)
    for folder in (checkpoints["llama"], tmp_path):
        record = record_of(folder)
        assert (record["kind"], record["fingerprint"]) == ("float checkpoint", None)
        assert record["totals"]["integers"]["weights"] == 0
        assert record["totals"]["all"]["bytes"] == data_bytes(folder / "model.safetensors")
        grids = {(t["grid"], t["bits_per_weight"]) for t in record["tensors"].values()}
        assert ("float32", 32.0) in grids
        assert len(grids) == 1 or folder == tmp_path  # integers of batch norms


def test_one_layer_of_each_kind_is_read_of_gptq(monkeypatch: pytest.MonkeyPatch) -> None:
    files, plain = SafetensorsFiles(GPTQ), SafetensorsFiles.read
    spy = mock.Mock(side_effect=lambda name: plain(files, name))
    monkeypatch.setattr(SafetensorsFiles, "read", lambda self, name: spy(name))
    inspection = inspect_source(str(GPTQ))
    read = [call.args[0] for call in spy.mock_calls]
    assert inspection.kind == "gptq checkpoint"
    integers = [t for t in inspection.tensors if t.is_integers]
    layers = {name.rpartition(".")[0] for name in read if name.endswith("qweight")}
    assert len(layers) == len({(t.shape, t.bytes) for t in integers}) < len(integers)
    tensor = next(t for t in integers if t.name.endswith("down_proj.weight"))
    layer = tensor.name.removesuffix(".weight")
    names = [n for n in files.names() if n.startswith(f"{layer}.") and not n.endswith(".bias")]
    assert len(names) == 4
    assert tensor.bytes == sum(files.read(n).nbytes for n in names)
    assert tensor.shape == (files.shape(f"{layer}.qweight")[1], *files.shape(f"{layer}.g_idx"))
    assert tensor.grid.startswith("int4 ")


def test_symmetry_is_claimed_only_where_it_was_read(tmp_path: Path) -> None:
    """Of two GPTQ layers of one kind, one happens to have every zero point in the middle."""
    shutil.copytree(GPTQ, tmp_path, dirs_exist_ok=True)
    layers = [f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up")]
    stored = load_file(tmp_path / "model.safetensors")
    # 8, less the one that version 1 subtracts; and another
    zeros = dict(zip(layers, (0x77777777, 0x55555555), strict=True))
    changes = {f"{n}.qzeros": torch.full_like(stored[f"{n}.qzeros"], z) for n, z in zeros.items()}
    edit_tensors(tmp_path / "model.safetensors", changes)

    def grids(against: str | None) -> list[str]:
        found = {t.name: t.grid for t in inspect_source(str(tmp_path), against).tensors}
        return [found[f"{layer}.weight"] for layer in layers]

    assert grids(None) == ["int4 per block 32"] * 2
    symmetric, asymmetric = "int4 symmetric per block 32", "int4 asymmetric per block 32"
    assert grids(str(tmp_path)) == [symmetric, asymmetric]


def test_adapters_are_listed_with_their_base(base: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = base
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    wrapped, place = get_peft_model(model, config), tmp_path / "adapters" / "first"
    save_adapter(wrapped, place)
    (record,) = json.loads(answered("adapters", "list", place, "--json"))["adapters"]
    facts = [record[key] for key in ("kind", "rank", "alpha", "modules", "base")]
    assert facts == ["LoRA", 2, 4, 2 * model.config.num_hidden_layers, fingerprint(model)]
    sizes = [p.numel() for name, p in wrapped.named_parameters() if "lora_" in name]
    assert record["parameters"] == sum(sizes)
    row = answered("adapters", "list", place).splitlines()[1]
    assert row.split()[1:4] == ["LoRA", "2", "4"]
    (tmp_path / ".qwlora").mkdir()
    out = answered("adapters", "list", tmp_path)
    assert fingerprint(model)[:16] in out
    assert "a different base" not in out
    other = packed_model("llama", seed=1)
    save_base(other, folder, byte_tokenizer(), source="somewhere")
    assert "(a different base)" in answered("adapters", "list", tmp_path)
    found = json.loads(answered("inspect", tmp_path, "--json"))  # of a job, its base
    assert found["fingerprint"] == fingerprint(other)


def test_whatever_else_is_refused_with_a_reason(base, tmp_path, checkpoints) -> None:
    folder, _ = base
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    for name in ("half", "shapes"):
        (tmp_path / name).mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    gpt2(n_layer=1, bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "shapes")
    record = json.loads((folder / "base.json").read_text())
    record["layers"]["model.layers.0.mlp.up_proj"]["bitwidth"] = 999
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    (damaged / "base.json").write_text(json.dumps(record))
    reseal(damaged, "base.json")
    for arguments, message in {
        (tmp_path / "nowhere",): "does not exist",
        (tmp_path / "text.txt",): r"is neither a folder nor a \.gguf file|is not a \.gguf file",
        (tmp_path / "bad.gguf",): "bad.gguf",
        (tmp_path / "half",): "has no config.json",
        ("somebody/a-model-that-is-not-here",): "cannot be downloaded from the hub either:\n",
        (folder, "--against", tmp_path / "nowhere"): "does not exist",
        (folder, "--against", checkpoints["gpt2"]): "no tensor name in common",
        (
            tmp_path / "shapes",
            "--against",
            checkpoints["gpt2"],
        ): r"wte\.weight .*\[64, 32\] .*\[260, ",
        (damaged,): "layer 'model.layers.0.mlp.up_proj' of base.json",
    }.items():
        assert re.search(message, refused("inspect", *arguments))
