"""What QAIRT's pipeline takes: weights on their grids, their encodings, PEFT directories, a recipe."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qwlora
from conftest import byte_tokenizer, tiny_model
from qwlora.errors import ExportError, SourceError, VerificationError
from qwlora.formats.aimet_encodings import read_encodings
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme
from qwlora.nn import pack_at_
from qwlora.nn.packed_layer import packed_weights
from qwlora.quantize.layer_rules import LayerRule
from qwlora.system.atomic import files_in
from qwlora.targets.canonical_adapter import read_canonical
from qwlora.targets.npu.qairt_pipeline import RECIPE
from qwlora.targets.proof.contents import check_contents
from qwlora.targets.proof.readme import usage
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase

TARGET = TARGETS["qairt_pipeline"]
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
EMBEDDING = [LayerRule(match="*embed_tokens", scheme=Scheme(8, True, PerBlock(32)))]


def base(grid: str = "w4-channel", solver: str = "rtn", **more: Any) -> Any:
    model = tiny_model("llama", layers=2)
    qwlora.quantize_(model, grid, solver, **more)
    return model


def written(model: Any, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    TARGET.backend.write_base(ExportedBase(model, byte_tokenizer()), folder)
    return folder


@pytest.mark.parametrize(
    ("grid", "rules"),
    [
        ("w4-tensor-asymmetric", []),
        ("w4-channel", EMBEDDING),  # with the head, which is tied to it
        ("w3-channel-asymmetric", []),
        ("w8-block32", []),
        ("w4-lpbq16", []),
        ("w4-signed32", []),
    ],
)
def test_the_integers_are_read_back_bit_for_bit(
    grid: str, rules: list[LayerRule], tmp_path: Path
) -> None:
    model = base(grid, rules=rules)
    folder = written(model, tmp_path)
    read = qwlora.load_precomputed(qwlora.open_checkpoint(folder, folder / "model.encodings"))
    found, expected = packed_weights(read), packed_weights(model)
    assert found.keys() == expected.keys()
    floats = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    for name, layer in expected.items():
        stored = layer.encoding.with_positive_scales()  # equal scales and offsets, so equal codes
        assert torch.equal(found[name].tensor.dequantize(), layer.tensor.dequantize())
        assert torch.equal(found[name].encoding.scale, stored.scale)
        assert torch.equal(found[name].encoding.offset, stored.offset)
        assert torch.equal(floats.get_parameter(name), layer.tensor.dequantize())


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
    TARGET.backend.open(folder, "base")


@pytest.mark.parametrize("wider", [1.0, 1.5])
def test_the_readme_counts_the_codes_that_the_range_of_the_weights_changes(
    wider: float, tmp_path: Path
) -> None:
    model, name = tiny_model("llama", layers=1), "model.layers.0.mlp.up_proj.weight"
    weight = model.get_parameter(name).detach()
    grid = measure(weight, Scheme(4, granularity=PerChannel()))
    grid = Encoding(grid.scheme, wider * grid.scale, grid.offset)  # 1.5: no code is an end
    codes = grid.quantize(weight)
    pack_at_(model, name, QuantizedTensor(codes, grid))
    values = grid.dequantize(codes)
    scale = torch.maximum(values.amax(1) / 7, values.amin(1) / -8)[:, None]  # AIMET's
    count = int(((values / scale).round() + 8 != codes).sum())
    assert (count > 0) == (wider > 1)
    text = (written(model, tmp_path) / "README.md").read_text()
    assert f"**{count:,} of {codes.numel():,}** codes change" in text


def test_a_weight_off_its_grid_is_named(tmp_path: Path) -> None:
    folder = written(base(), tmp_path)
    TARGET.backend.open(folder, "base")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = tensors[name][3, 5].nextafter(torch.tensor(9.0))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match=rf"{name}: 1 of 8,192 values are off the grid"):
        TARGET.backend.open(folder, "base")


def test_layers_that_aimet_does_not_quantize_are_refused(tmp_path: Path) -> None:
    model = tiny_model("gpt2", layers=1)
    qwlora.quantize_(model, "w4-channel", "rtn")
    with pytest.raises(ExportError, match=r"c_attn\.weight.*Conv1D"):
        written(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_adapters_have_one_rank_and_names_within_a_layer(tmp_path: Path) -> None:
    model = base()
    folder = written(model, tmp_path / "base")
    shape = LoraConfig(
        r=6,
        lora_alpha=12,
        use_rslora=True,
        target_modules=["model.layers.1.self_attn.q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"down_proj": 5},
        init_lora_weights=False,
    )
    adapted: Any = get_peft_model(model, shape).eval()
    qwlora.save_adapter(adapted, tmp_path / "trained")
    (tmp_path / "first").mkdir()
    canonical = read_canonical(tmp_path / "trained")
    TARGET.backend.write_adapter(canonical, folder, tmp_path / "first")
    config = json.loads((tmp_path / "first" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (6, 6, {})
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert {min(t.shape) for t in tensors.values()} == {6}
    unadapted = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    assert not any(tensors[f"{unadapted}{half}.weight"].any() for half in "AB")
    runtime = TARGET.backend.open(folder, "base")
    runtime.use(tmp_path / "first")
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
    torch.testing.assert_close(
        runtime.logits(IDS), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )


def test_the_lines_for_all_adapters_have_their_names_as_texts() -> None:
    lines = usage("qairt_pipeline", "base", "on", True, "1e3", "a.b")
    lora = yaml.safe_load(lines.partition("```yaml")[2].partition("```")[0])["features"]["lora"]
    assert lora["adapters"] == {name: {"path": f"./{name}"} for name in ("on", "1e3", "a.b")}
    for name, case in lora["use_cases"].items():
        assert (case["adapters"], case["lora_scaling"]) == ([name], [1.0])


def check(folder: Path, part: str) -> None:
    """What `qwlora verify` does with a part of a bundle before it runs it."""
    files = files_in(folder / part)
    check_contents(TARGET.backend.contents, folder / part, files, part == "base")


def test_files_that_were_changed_with_their_digests_are_refused(tmp_path: Path) -> None:
    model, folder = base(), tmp_path / "out"
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    qwlora.save_adapter(adapted, tmp_path / "trained")
    adapters = {"first": tmp_path / "trained"}
    qwlora.export(adapted.unload(), "qairt_pipeline", folder, adapters, byte_tokenizer())
    for part in ("base", "first"):
        check(folder, part)
    with (folder / "first" / RECIPE).open("a") as file:
        file.write("custom_stage: ./plugin.py\n")  # which QAIRT would run
    with pytest.raises(SourceError, match="it is not the script that an export writes"):
        check(folder, "first")
    encodings = folder / "base" / "model.encodings"
    encodings.write_text(encodings.read_text().replace('"scale": [', '"scale": [9', 1))
    check(folder, "base")
    with pytest.raises(VerificationError, match=r"q_proj\.weight: \d+ of 4,096 values are off"):
        TARGET.open(folder)
