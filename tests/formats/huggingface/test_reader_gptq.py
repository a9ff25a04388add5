"""GPTQ layers equal what GPT-QModel unpacks, bit for bit (files/gptq-*)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from formats.models import edit_json, edit_tensors
from qwlora.errors import SourceError
from qwlora.formats.huggingface.gptq_awq_mlx import QweightTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme

FILES = Path(__file__).parents[1] / "files"
LAYER = "w4-asymmetric-32"


def opened(folder: Path, version: int = 1, **settings: Any) -> QweightTensors:
    layout = {1: "gptq", 2: "gptq_v2"}[version]
    settings = {"bits": 4, "checkpoint_format": layout, **settings}
    return QweightTensors(SafetensorsFiles(folder), settings, "gptq")


def read(folder: Path, version: int = 1, name: str = LAYER, **settings: Any) -> QuantizedTensor:
    value = opened(folder, version, **settings).read(f"{name}.weight")
    assert isinstance(value, QuantizedTensor)
    return value


def expected(folder: Path, name: str = LAYER) -> torch.Tensor:
    return load_file(folder / "expected.safetensors")[f"{name}.weight"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64])
def test_layers_equal_gptqmodels(version: int, bits: int, kind: str, group: int) -> None:
    folder, name = FILES / f"gptq-v{version}", f"w{bits}-{kind}-{group}"
    found = read(folder, version, name, bits=bits, dynamic={"all": {}})
    assert torch.equal(found.dequantize(), expected(folder, name))
    granularity = PerBlock(32) if group == 32 else PerChannel(0)
    assert found.encoding.scheme == Scheme(bits, kind == "symmetric", granularity)


def test_a_version_read_as_the_other_is_another_weight() -> None:
    """The golden files hold a zero point of zero, from which version 1 subtracts one."""
    for version in (1, 2):
        assert int(read(FILES / f"gptq-v{version}", version).encoding.offset.max()) == 0
    folder = FILES / "gptq-v1"
    assert not torch.equal(read(folder, 2).dequantize(), expected(folder))


def check_model(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    values = {name: checkpoint.read(name) for name in checkpoint.names()}
    quantized = {name: v for name, v in values.items() if isinstance(v, QuantizedTensor)}
    wanted = load_file(FILES / "gptqmodel-llama" / "expected.safetensors")
    assert quantized.keys() == wanted.keys()
    assert len(wanted) == 7
    assert all(torch.equal(value.dequantize(), wanted[n]) for n, value in quantized.items())
    assert not hasattr(checkpoint.config, "quantization_config")
    assert isinstance(values["lm_head.weight"], torch.Tensor)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of GPT-QModel, to change."""
    ignored = shutil.ignore_patterns("expected*")
    return Path(shutil.copytree(FILES / "gptqmodel-llama", tmp_path / "model", ignore=ignored))


@pytest.mark.parametrize("name", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_whole_checkpoint(model: Path, name: str, is_old: bool) -> None:
    """As GPT-QModel writes it, and as AutoGPTQ did: a file of its own name, and the settings next to
    a config.json that says nothing of them."""
    (model / "model.safetensors").rename(model / name)
    if is_old:
        settings = json.loads((model / "config.json").read_text())["quantization_config"]
        (model / "quantize_config.json").write_text(json.dumps(settings))
        edit_json(model / "config.json", quantization_config=None)
    check_model(model)


def test_group_order_of_whole_runs_is_a_grid() -> None:
    folder = FILES / "gptq-order"
    assert torch.equal(read(folder, 2, "runs").dequantize(), expected(folder, "runs"))
    with pytest.raises(
        SourceError,
        match=r"layer 'scattered' \(GPTQ\) was quantized in activation order.*desc_act=False",
    ):
        read(folder, 2, "scattered")


def changed(tmp_path: Path, **parts: Any) -> Path:
    """A folder with one layer, some of its tensors replaced; None leaves one out."""
    held = load_file(FILES / "gptq-v1" / "model.safetensors")
    layer = {part: held[f"{LAYER}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    tensors = {f"{LAYER}.{part}": t for part, t in (layer | parts).items() if t is not None}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_g_idx_may_be_absent(tmp_path: Path) -> None:
    found = read(changed(tmp_path, g_idx=None))
    assert torch.equal(found.dequantize(), expected(FILES / "gptq-v1"))


def test_negative_scales_of_autoround_keep_their_values(tmp_path: Path) -> None:
    scales = load_file(FILES / "gptq-v1" / "model.safetensors")[f"{LAYER}.scales"].clone()
    scales[0, ::2] *= -1
    wanted = expected(FILES / "gptq-v1").clone()
    wanted[::2, :32] *= -1
    value = read(changed(tmp_path, scales=scales))
    assert torch.equal(value.dequantize(), wanted)
    assert bool((value.encoding.scale > 0).all())


def words(*shape: int, value: int = 0) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.int32)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"qzeros": None}, r"layer 'w4-asymmetric-32' \(GPTQ\): .*\[\].* must be matrices"),
        (
            {"scales": torch.full((2, 32), torch.nan)},
            r"'w4-asymmetric-32' \(GPTQ\): a scale is a finite positive number, but 64 of 64",
        ),
        ({"scales": torch.zeros(2, 32)}, "a scale is a finite positive number"),
        ({"scales": torch.ones(2, 31)}, r"scales' is F32 \[2, 31\], but .* \[2, 32\]"),
        (
            {"scales": torch.ones(3, 32), "qzeros": words(3, 4)},
            "groups of 21.3333 do not divide rows of 64 evenly",
        ),
        ({"scales": torch.ones(0, 32), "qzeros": words(0, 4)}, "groups of 0 do not divide"),
        ({"qweight": words(8, 32).long()}, r"qweight' is I64 \[8, 32\], but .* need I32"),
        ({"qweight": words(8)}, "must be matrices"),
        ({"qweight": words(9, 32)}, r"qweight' is I32 \[9, 32\], but .* \[8, 32\]"),
        ({"g_idx": words(64, value=2)}, "g_idx contains group 2 or 2, but there are 2"),
        ({"g_idx": words(64, value=-1)}, "g_idx contains group -1 or -1"),
    ],
)
def test_damaged_layers(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        read(changed(tmp_path, **parts))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_format": "marlin"}, "layout 'marlin' is not supported; gptq and gptq_v2 are"),
        ({"is_marlin_format": True}, "GPTQ layout 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "GPTQ layout 'gptq_p'"),
        ({"checkpoint_format": ["gptq"]}, r"GPTQ layout \"\['gptq'\]\""),
        ({"bits": 5}, "bits is 5, but GPTQ files have 2, 3, 4, 8"),
        ({"bits": "4"}, "bits is '4'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        opened(FILES / "gptq-v1", **settings)


def test_zero_biases_that_the_model_does_not_have(model: Path) -> None:
    """AutoGPTQ gives every layer a bias."""
    bias = "model.layers.0.mlp.down_proj.bias"
    edit_tensors(model / "model.safetensors", {bias: torch.zeros(64)})
    check_model(model)
    edit_tensors(model / "model.safetensors", {bias: torch.ones(64)})
    with pytest.raises(SourceError, match=f"'{bias}' is in the files, but not in LlamaForCausalLM"):
        open_checkpoint(model)
