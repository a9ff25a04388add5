"""GPTQ layers equal what GPT-QModel unpacks, bit for bit (files/gptq-*)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwlora.errors import SourceError
from qwlora.formats.huggingface.qweight import QweightTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel

FILES = Path(__file__).parent / "files"
LAYER = "w4-asymmetric-32"


def opened(folder: Path, version: int = 1, **settings: Any) -> QweightTensors:
    return QweightTensors(
        SafetensorsFiles(folder),
        {"bits": 4, "checkpoint_format": {1: "gptq", 2: "gptq_v2"}[version], **settings},
        "gptq",
    )


def read(tensors: QweightTensors, name: str) -> QuantizedTensor:
    value = tensors.read(name)
    assert isinstance(value, QuantizedTensor)
    return value


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("group", [32, 64])
def test_layers_equal_gptqmodels(version: int, bits: int, kind: str, group: int) -> None:
    folder, name = FILES / f"gptq-v{version}", f"w{bits}-{kind}-{group}.weight"
    found = read(opened(folder, version, bits=bits, dynamic={"all": {}}), name)
    assert torch.equal(found.dequantize(), load_file(folder / "expected.safetensors")[name])
    scheme = found.encoding.scheme
    assert (scheme.bitwidth, scheme.symmetric, scheme.granularity) == (
        bits,
        kind == "symmetric",
        PerBlock(32) if group == 32 else PerChannel(0),
    )


def test_the_golden_files_hold_a_zero_point_of_zero() -> None:
    """From which version 1 subtracts one: the case in which readers differ."""
    for version in (1, 2):
        assert (
            int(
                read(
                    opened(FILES / f"gptq-v{version}", version), f"{LAYER}.weight"
                ).encoding.offset.max()
            )
            == 0
        )


def test_a_version_read_as_the_other_is_another_weight() -> None:
    expected = load_file(FILES / "gptq-v1" / "expected.safetensors")[f"{LAYER}.weight"]
    assert not torch.equal(
        read(opened(FILES / "gptq-v1", 2), f"{LAYER}.weight").dequantize(), expected
    )


def test_a_whole_checkpoint_of_gptqmodel() -> None:
    folder = FILES / "gptqmodel-llama"
    checkpoint, expected = open_checkpoint(folder), load_file(folder / "expected.safetensors")
    quantized = {
        name: value
        for name in checkpoint.names()
        if isinstance(value := checkpoint.read(name), QuantizedTensor)
    }
    assert quantized.keys() == expected.keys()
    assert len(expected) == 7
    for name, value in quantized.items():
        assert torch.equal(value.dequantize(), expected[name])
    assert not hasattr(checkpoint.config, "quantization_config")
    assert isinstance(checkpoint.read("lm_head.weight"), torch.Tensor)


def test_a_folder_as_autogptq_wrote_it(tmp_path: Path) -> None:
    """One file of its own name, and the settings beside a config.json that says nothing of them."""
    original = FILES / "gptqmodel-llama"
    shutil.copy(original / "model.safetensors", tmp_path / "gptq_model-4bit-128g.safetensors")
    config = json.loads((original / "config.json").read_text())
    (tmp_path / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, expected = open_checkpoint(tmp_path), load_file(original / "expected.safetensors")
    for name, value in expected.items():
        found = checkpoint.read(name)
        assert isinstance(found, QuantizedTensor)
        assert torch.equal(found.dequantize(), value)


def test_group_order_of_whole_runs_is_a_grid() -> None:
    expected = load_file(FILES / "gptq-order" / "expected.safetensors")["runs.weight"]
    assert torch.equal(read(opened(FILES / "gptq-order", 2), "runs.weight").dequantize(), expected)


def test_scattered_activation_order_is_refused() -> None:
    with pytest.raises(
        SourceError,
        match=r"layer 'scattered' \(GPTQ\) was quantized in activation order.*desc_act=False",
    ):
        opened(FILES / "gptq-order", 2).read("scattered.weight")


def changed(tmp_path: Path, **parts: Any) -> Path:
    """A folder with one layer, some of its tensors replaced; None leaves one out."""
    held = load_file(FILES / "gptq-v1" / "model.safetensors")
    layer = {part: held[f"{LAYER}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx")}
    layer |= parts
    save_file(
        {f"{LAYER}.{part}": tensor for part, tensor in layer.items() if tensor is not None},
        tmp_path / "model.safetensors",
    )
    return tmp_path


def test_g_idx_may_be_absent(tmp_path: Path) -> None:
    expected = load_file(FILES / "gptq-v1" / "expected.safetensors")[f"{LAYER}.weight"]
    assert torch.equal(
        read(opened(changed(tmp_path, g_idx=None)), f"{LAYER}.weight").dequantize(), expected
    )


def test_negative_scales_of_autoround_keep_their_values(tmp_path: Path) -> None:
    scales = load_file(FILES / "gptq-v1" / "model.safetensors")[f"{LAYER}.scales"].clone()
    scales[0, ::2] *= -1
    expected = load_file(FILES / "gptq-v1" / "expected.safetensors")[f"{LAYER}.weight"].clone()
    expected[::2, :32] *= -1
    value = read(opened(changed(tmp_path, scales=scales)), f"{LAYER}.weight")
    assert torch.equal(value.dequantize(), expected)
    assert bool((value.encoding.scale > 0).all())


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
            {"scales": torch.ones(3, 32), "qzeros": torch.zeros(3, 4, dtype=torch.int32)},
            "groups of 21.3333 do not divide rows of 64 evenly",
        ),
        (
            {"scales": torch.ones(0, 32), "qzeros": torch.zeros(0, 4, dtype=torch.int32)},
            "groups of 0 do not divide",
        ),
        (
            {"qweight": torch.zeros(8, 32, dtype=torch.int64)},
            r"qweight' is I64 \[8, 32\], but .* need I32",
        ),
        ({"qweight": torch.zeros(8, dtype=torch.int32)}, "must be matrices"),
        (
            {"qweight": torch.zeros(9, 32, dtype=torch.int32)},
            r"qweight' is I32 \[9, 32\], but .* \[8, 32\]",
        ),
        (
            {"g_idx": torch.full((64,), 2, dtype=torch.int32)},
            "g_idx contains group 2 or 2, but there are 2",
        ),
        ({"g_idx": torch.full((64,), -1, dtype=torch.int32)}, "g_idx contains group -1 or -1"),
    ],
)
def test_damaged_layers(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        opened(changed(tmp_path, **parts)).read(f"{LAYER}.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"checkpoint_format": "marlin"},
            "GPTQ layout 'marlin' is not supported; gptq and gptq_v2 are",
        ),
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


def test_zero_biases_that_the_model_does_not_have(tmp_path: Path) -> None:
    """AutoGPTQ gives every layer a bias."""
    folder = tmp_path / "model"
    shutil.copytree(FILES / "gptqmodel-llama", folder)
    tensors = load_file(folder / "model.safetensors")
    bias = "model.layers.0.mlp.down_proj.bias"
    save_file({**tensors, bias: torch.zeros(64)}, folder / "model.safetensors")
    assert bias not in open_checkpoint(folder).names()
    save_file({**tensors, bias: torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(
        SourceError,
        match=r"'model.layers.0.mlp.down_proj.bias' is in the files, but not in LlamaForCausalLM",
    ):
        open_checkpoint(folder)


def test_settings_in_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(FILES / "gptqmodel-llama", folder)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    name = "model.layers.0.mlp.down_proj.weight"
    value = open_checkpoint(folder).read(name)
    assert isinstance(value, QuantizedTensor)
    assert torch.equal(value.dequantize(), load_file(folder / "expected.safetensors")[name])
