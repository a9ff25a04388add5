"""What QAIRT's pipeline takes: weights on their grids, their encodings, PEFT directories, a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora.errors import SourceError, VerificationError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.nn.packed_layer import packed_weights
from qwlora.targets.npu.qairt_pipeline import RECIPE
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from targets.proof.test_bundle_contents import check

TARGET = TARGETS["qairt_pipeline"]
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))


def base(grid: str = "w4-channel", solver: str = "rtn", **more: Any) -> Any:
    model = tiny_model("llama", layers=2)
    qwlora.quantize_(model, grid, solver, **more)
    return model


def written(model: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    TARGET.backend.write_base(ExportedBase(model, byte_tokenizer()), folder)
    return folder


def test_the_file_for_aimet_torch_lists_every_grid(tmp_path: Path) -> None:
    model = base("w4-block32")
    file = read_encodings(written(model, tmp_path) / "model_torch.encodings")
    assert file.version == "0.6.1"
    for name, layer in packed_weights(model).items():
        entry: Any = file.by_name[name]
        assert torch.equal(
            torch.from_numpy(entry.scale.copy()).float(), layer.encoding.scale.flatten()
        )
        assert {*entry.offset.tolist()} == {-8}
    assert "lm_head" in file.excluded_layers


def test_a_base_in_bfloat16_is_written_in_float32(tmp_path: Path) -> None:
    model = base().to(torch.bfloat16)
    folder = written(model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]  # for transformers 4
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    floats = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, layer in packed_weights(model).items():
        assert torch.equal(floats.get_parameter(name), layer.tensor.dequantize())
    TARGET.backend.open(folder, "base")


def test_all_adapters_of_a_bundle_have_one_rank_on_the_same_modules(tmp_path: Path) -> None:
    """Modules by their names within a layer; a layer that an adapter leaves out has zeros."""
    model, out = base(), tmp_path / "out"
    layers = ["model.layers.1.self_attn.q_proj", "down_proj"]
    patterns: Any = {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"down_proj": 5}}
    shapes = {
        "first": LoraConfig(r=6, lora_alpha=12, use_rslora=True, target_modules=layers, **patterns),
        "second": LoraConfig(r=4, target_modules=["v_proj"]),
    }
    expected, folders = {}, {}
    for name, shape in shapes.items():
        shape.init_lora_weights = False
        adapted: Any = get_peft_model(model, shape).eval()
        qwlora.save_adapter(adapted, folders.setdefault(name, tmp_path / name))
        with torch.no_grad():
            expected[name] = adapted(input_ids=IDS).logits
        model = adapted.unload()
    qwlora.export(model, "qairt_pipeline", out, folders, byte_tokenizer())
    runtime, sizes = TARGET.open(out), []
    for name, logits in expected.items():
        tensors = load_file(out / name / "adapter_model.safetensors")
        config = json.loads((out / name / "adapter_config.json").read_text())
        assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
        assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
        sizes.append({n: t.shape for n, t in tensors.items()})
        runtime.use(out / name)
        limit = 1e-4 * float(logits.abs().max())
        torch.testing.assert_close(runtime.logits(IDS), logits, rtol=0, atol=limit)
    assert sizes[0] == sizes[1]
    assert {min(shape) for shape in sizes[0].values()} == {6}


def test_the_lines_for_all_adapters_have_their_names_as_texts() -> None:
    lines = usage("qairt_pipeline", "base", "on", True, "1e3", "a.b")
    lora = yaml.safe_load(lines.partition("```yaml")[2].partition("```")[0])["features"]["lora"]
    assert lora["adapters"] == {name: {"path": f"./{name}"} for name in ("on", "1e3", "a.b")}
    for name, case in lora["use_cases"].items():
        assert (case["adapters"], case["lora_scaling"]) == ([name], [1.0])


def test_files_that_were_changed_with_their_digests_are_refused(tmp_path: Path) -> None:
    model, folder = base(), tmp_path / "out"
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    qwlora.save_adapter(adapted, tmp_path / "trained")
    adapters = {"first": tmp_path / "trained"}
    qwlora.export(adapted.unload(), "qairt_pipeline", folder, adapters, byte_tokenizer())
    for part, place in (("base", "base"), ("first", "adapter")):
        check(folder / part, f"qairt_pipeline/{place}")
    with (folder / "first" / RECIPE).open("a") as file:
        file.write("custom_stage: ./plugin.py\n")  # which QAIRT would run
    with pytest.raises(SourceError, match="it is not the script that an export writes"):
        check(folder / "first", "qairt_pipeline/adapter")
    encodings = folder / "base" / "model.encodings"
    encodings.write_text(encodings.read_text().replace('"scale": [', '"scale": [9', 1))
    check(folder / "base", "qairt_pipeline/base")
    with pytest.raises(VerificationError, match=r"q_proj\.weight: \d+ of 4,096 values are off"):
        TARGET.open(folder)
