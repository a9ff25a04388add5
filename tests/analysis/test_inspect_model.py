"""`qwlora inspect`: sizes, grids and SQNR are right; any other input ends with code 2 and a reason."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from conftest import byte_tokenizer, reseal, tiny_model
from qwlora import fingerprint, quantize_, save_adapter, save_base
from qwlora.analysis.inspect_model import inspect_source
from qwlora.cli.main import main
from qwlora.encodings.grids import entry_of
from qwlora.encodings.version_1_0_0 import json_of
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.grid.min_max import measure
from qwlora.grid.scheme import PerChannel, Scheme, parse_scheme
from qwlora.nn import packed_weights
from qwlora.quantize.layer_rules import Rule

GPTQ = Path(__file__).parent.parent / "formats" / "files" / "gptqmodel-llama"
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qwlora", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def base(tmp_path: Path) -> tuple[Path, Any]:
    model = tiny_model("llama")
    rules = [
        Rule("*.down_proj", parse_scheme("w8-channel")),
        Rule("*.1.mlp.up_proj", parse_scheme("w3-block16-asymmetric")),
    ]
    quantize_(model, "w4-block32", "rtn", rules=rules)
    (tmp_path / "base").mkdir()
    save_base(model, byte_tokenizer(), tmp_path / "base", "somewhere")
    return tmp_path / "base", model


def data_bytes(file: Path) -> int:
    """What a safetensors file holds besides its header."""
    return file.stat().st_size - 8 - struct.unpack("<Q", file.read_bytes()[:8])[0]


def by_name(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {tensor["name"]: tensor for tensor in record["tensors"]}


def test_a_base_as_json(base: tuple[Path, Any], call: Call) -> None:
    folder, model = base
    code, out, _ = call(folder, "--json")
    record = json.loads(out)
    tensors = by_name(record)
    assert code == 0
    assert record["kind"] == "QWLoRA base"
    assert record["fingerprint"] == fingerprint(model)
    assert record["totals"]["all"]["bytes"] == data_bytes(folder / "base.safetensors")
    assert record["totals"]["all"]["weights"] == tiny_model("llama").num_parameters()
    for name, layer in packed_weights(model).items():
        assert (tensors[name]["grid"], tensors[name]["shape"]) == (
            str(layer.scheme),
            list(layer.codes.shape),
        )
    assert tensors["model.layers.0.mlp.up_proj.weight"]["bits_per_weight"] in (4.5, 5.0), (
        "four bits, and a scale of 16 or 32 for each 32 weights"
    )
    assert tensors["model.norm.weight"]["grid"] in ("float16", "float32")
    integers = [t for t in record["tensors"] if t["grid"].startswith("int")]
    assert len(integers) == len(packed_weights(model))
    assert record["totals"]["integers"]["bytes"] == sum(t["bytes"] for t in integers)


def test_a_base_as_text_groups_what_is_alike(base: tuple[Path, Any], call: Call) -> None:
    folder, model = base
    code, out, _ = call(folder)
    assert code == 0
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    assert lines["model.layers.*.self_attn.q_proj.weight"][1:3] == ["2", "64x64"]
    assert lines["model.layers.*.mlp.down_proj.weight"][3:7] == [
        "int8",
        "symmetric",
        "per",
        "channel",
    ]
    assert lines["model.layers.0.mlp.up_proj.weight"][3] == "int4"
    assert lines["model.layers.1.mlp.up_proj.weight"][3:7] == ["int3", "asymmetric", "per", "block"]
    assert f"fingerprint {fingerprint(model)}" in out


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sqnr_against_the_float_model_is_that_of_a_plain_computation(
    architecture: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2 has square weights that are stored the other way round."""
    model, plain = tiny_model(architecture), tiny_model(architecture)
    quantize_(model, "w4-block32", "rtn")
    save_base(model, byte_tokenizer(), tmp_path, "somewhere")
    found = {
        t.name: t
        for t in inspect_source(str(tmp_path), against=str(checkpoints[architecture])).tensors
    }
    turned = type(plain).__name__.startswith("GPT2")
    for name, layer in packed_weights(model).items():
        w, w_hat = plain.get_parameter(name).detach(), layer.quantized.dequantize()
        w = w.T if turned and ".c_" in name else w
        expected = float(
            10 * torch.log10(w.double().square().sum() / (w - w_hat).double().square().sum())
        )
        assert found[name].sqnr_db == pytest.approx(expected, abs=1e-6)
        assert 15 < expected < 35
    floats = [t for t in found.values() if not t.is_integers]
    assert floats
    assert all(t.sqnr_db == math.inf for t in floats)


def test_equal_sources_are_exact(base: tuple[Path, Any], call: Call) -> None:
    folder, _ = base
    code, out, _ = call(folder, "--against", folder, "--json")
    assert code == 0
    assert all(t["exact"] is True and t["sqnr_db"] is None for t in json.loads(out)["tensors"])
    _, out, _ = call(folder, "--against", folder)
    assert out.splitlines()[2].endswith("SQNR dB")
    assert out.splitlines()[3].endswith("exact")


def test_a_float_checkpoint(checkpoints: dict[str, Path], call: Call) -> None:
    _, out, _ = call(checkpoints["llama"], "--json")
    record = json.loads(out)
    assert (record["kind"], record["fingerprint"], record["totals"]["integers"]["weights"]) == (
        "float checkpoint",
        None,
        0,
    )
    assert record["totals"]["all"]["bytes"] == data_bytes(
        checkpoints["llama"] / "model.safetensors"
    )
    assert {t["grid"] for t in record["tensors"]} == {"float32"}
    assert {t["bits_per_weight"] for t in record["tensors"]} == {32.0}


def test_a_float_checkpoint_of_no_language_model_is_shown_by_its_headers(
    tmp_path: Path, call: Call
) -> None:
    from transformers import ResNetConfig, ResNetModel

    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(
        tmp_path
    )
    code, out, _ = call(tmp_path, "--json")
    assert code == 0
    assert json.loads(out)["totals"]["all"]["bytes"] == data_bytes(tmp_path / "model.safetensors")


def test_a_gptq_checkpoint_of_gptqmodel(call: Call) -> None:
    _, out, _ = call(GPTQ, "--json")
    record = json.loads(out)
    assert record["kind"] == "gptq checkpoint"
    name = next(n for n in by_name(record) if n.endswith("down_proj.weight"))
    tensor, files = by_name(record)[name], SafetensorsFiles(GPTQ)
    layer = name.removesuffix(".weight")
    stored = [
        files.read(n)
        for n in files.names()
        if n.startswith(f"{layer}.") and not n.endswith(".bias")
    ]
    assert len(stored) == 4
    assert tensor["bytes"] == sum(t.nbytes for t in stored)
    assert tensor["shape"] == [
        files.shape(f"{layer}.qweight")[1],
        len(files.read(f"{layer}.g_idx")),
    ]
    assert tensor["grid"].startswith("int4 ")


def test_only_one_layer_of_a_kind_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    plain = SafetensorsFiles.read
    monkeypatch.setattr(
        SafetensorsFiles, "read", lambda self, name: (read.append(name), plain(self, name))[1]
    )
    found = inspect_source(str(GPTQ))
    layers = {name.rpartition(".")[0] for name in read if name.endswith("qweight")}
    kinds = {(t.shape, t.bytes) for t in found.tensors if t.is_integers}
    assert len(layers) == len(kinds) < sum(t.is_integers for t in found.tensors)


def test_symmetry_is_claimed_only_where_it_was_read(tmp_path: Path) -> None:
    """Of two GPTQ layers of one kind, one happens to have every zero point in the middle: neither's offsets stand for the other's."""
    shutil.copytree(GPTQ, tmp_path, dirs_exist_ok=True)
    files = load_file(tmp_path / "model.safetensors")
    first, second = sorted(
        name.removesuffix(".qzeros")
        for name in files
        if name.endswith(("up_proj.qzeros", "gate_proj.qzeros"))
    )[:2]
    files[f"{first}.qzeros"] = torch.full_like(
        files[f"{first}.qzeros"], 0x77777777
    )  # 8, less the one that version 1 subtracts
    files[f"{second}.qzeros"] = torch.full_like(files[f"{second}.qzeros"], 0x55555555)
    save_file(files, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = {t.name: t.grid for t in inspect_source(str(tmp_path)).tensors}
    assert found[f"{first}.weight"] == found[f"{second}.weight"] == "int4 per block 32"
    compared = {
        t.name: t.grid for t in inspect_source(str(tmp_path), against=str(tmp_path)).tensors
    }
    assert (compared[f"{first}.weight"], compared[f"{second}.weight"]) == (
        "int4 symmetric per block 32",
        "int4 asymmetric per block 32",
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_folder_of_floats_with_aimet_encodings(
    architecture: str, tmp_path: Path, call: Call, checkpoints: dict[str, Path]
) -> None:
    model, folder = tiny_model(architecture), checkpoints[architecture]
    kinds = (torch.nn.Linear, Conv1D)
    weights = {
        f"{n}.weight": m.weight.detach()
        for n, m in model.named_modules()
        if isinstance(m, kinds) and n != "lm_head"
    }
    weights = {
        name: weight.T if architecture == "gpt2" else weight for name, weight in weights.items()
    }
    grids = {
        name: measure(weight, Scheme(4, ".1." not in name, PerChannel(0)))
        for name, weight in weights.items()
    }
    entries = [json_of(entry_of(name, grid, "1.0.0")) for name, grid in grids.items()]
    file = tmp_path / "model.encodings"
    file.write_text(
        json.dumps({"version": "1.0.0", "activation_encodings": [], "param_encodings": entries})
    )
    code, out, err = call(
        folder, "--encodings", file, "--keep-float", "lm_head", "--against", folder, "--json"
    )
    assert (code, err) == (0, "")
    record = json.loads(out)
    assert record["kind"] == "float checkpoint with AIMET encodings"
    for name, weight in weights.items():
        tensor = by_name(record)[name]
        assert (tensor["shape"], tensor["grid"]) == (list(weight.shape), str(grids[name].scheme))
        noise = weight - grids[name].fake_quantize(weight)
        assert tensor["sqnr_db"] == pytest.approx(
            float(10 * torch.log10(weight.square().sum() / noise.square().sum())), abs=1e-3
        )
    file.write_text(
        json.dumps({"version": "1.0.0", "activation_encodings": [], "param_encodings": entries[1:]})
    )
    missing = next(iter(grids)).removesuffix(".weight")
    code, _, err = call(folder, "--encodings", file, "--keep-float", "lm_head")
    assert code == 2
    assert f"{missing}.weight" in err
    assert (
        call(folder, "--encodings", file, "--keep-float", "lm_head", "--keep-float", missing)[0]
        == 0
    )


def test_encodings_belong_to_floats(
    base: tuple[Path, Any], tmp_path: Path, call: Call, checkpoints: dict[str, Path]
) -> None:
    for arguments, message in {
        (base[0], "--encodings", "x"): "is quantized already (a base)",
        (GPTQ, "--encodings", "x"): "is quantized already (gptq)",
        (checkpoints["llama"], "--keep-float", "x"): "need --encodings",
        (checkpoints["llama"], "--block-order", "tensor"): "need --encodings",
    }.items():
        code, _, err = call(*arguments)
        assert code == 2
        assert message in err
    (tmp_path / ".qwlora").mkdir()
    code, _, err = call(tmp_path, "--encodings", "x")
    assert (code, "SOURCE is an adapter or a job's directory" in err) == (2, True)


def test_an_adapter_and_a_job_directory(base: tuple[Path, Any], tmp_path: Path, call: Call) -> None:
    folder, model = base
    wrapped = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    )
    save_adapter(wrapped, tmp_path / "adapters" / "first")
    _, out, _ = call(tmp_path / "adapters" / "first", "--json")
    record = json.loads(out)
    assert (record["kind"], record["r"], record["lora_alpha"], record["base_fingerprint"]) == (
        "adapter",
        2,
        4,
        fingerprint(model),
    )
    assert sum(math.prod(t["shape"]) for t in record["tensors"]) == sum(
        p.numel() for n, p in wrapped.named_parameters() if "lora_" in n
    )
    _, out, _ = call(tmp_path / "adapters" / "first")
    assert "LORA of rank 2, alpha 4, on q_proj, v_proj" in out
    (tmp_path / ".qwlora").mkdir()
    _, out, _ = call(tmp_path)
    assert f"trained on the base with fingerprint {fingerprint(model)}" in out
    assert "NOT the base" not in out
    other = tiny_model("llama", seed=1)
    quantize_(other, "w4-block32", "rtn")
    save_base(other, byte_tokenizer(), folder, "somewhere")
    _, out, _ = call(tmp_path)
    assert "NOT the base in this directory" in out
    _, out, _ = call(tmp_path, "--json")
    assert json.loads(out)["base"]["fingerprint"] == fingerprint(other)


def test_whatever_else_is_refused_with_a_reason(
    base: tuple[Path, Any], tmp_path: Path, call: Call, checkpoints: dict[str, Path]
) -> None:
    folder, _ = base
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_text("{}")
    for arguments, message in {
        (tmp_path / "nowhere",): "does not exist",
        (tmp_path / "text.txt",): "is not a .gguf file",
        (tmp_path / "empty",): "has no config.json",
        (tmp_path / "bad.gguf",): "bad.gguf",
        (tmp_path / "half",): "has no adapter_model.safetensors",
        (
            "somebody/a-model-that-is-not-here",
        ): "not-here), and cannot be downloaded from the hub either:\n",
        (folder, "--against", tmp_path / "nowhere"): "does not exist",
        (folder, "--against", checkpoints["gpt2"]): "no tensor name in common",
    }.items():
        code, out, err = call(*arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert "Traceback" not in err
    record = json.loads((folder / "base.json").read_text())
    record["layers"]["model.layers.0.mlp.up_proj"]["bitwidth"] = 999
    (folder / "base.json").write_text(json.dumps(record))
    reseal(folder, "base.json")
    code, _, err = call(folder)
    assert code == 2
    assert "layer 'model.layers.0.mlp.up_proj' in base.json" in err


def test_models_of_other_shapes_are_not_compared(
    tmp_path: Path, checkpoints: dict[str, Path], call: Call
) -> None:
    GPT2LMHeadModel(
        GPT2Config(
            n_embd=32,
            n_layer=1,
            n_head=2,
            vocab_size=99,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).save_pretrained(tmp_path)
    code, _, err = call(tmp_path, "--against", checkpoints["gpt2"])
    assert code == 2
    assert re.search(r"transformer\.wte\.weight .*\[99, 32\] .*\[260, 64\]", err)
