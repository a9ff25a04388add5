"""AWQ layers equal what AutoAWQ unpacks, bit for bit (files/awq-*)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qwlora.errors import SourceError
from qwlora.formats.huggingface.qweight import QweightTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel

FILES = Path(__file__).parent / "files"


def opened(
    folder: Path, version: str = "gemm", group_size: Any = 32, **settings: Any
) -> QweightTensors:
    return QweightTensors(
        SafetensorsFiles(folder),
        {"bits": 4, "version": version, "group_size": group_size, "zero_point": True, **settings},
        "awq",
    )


@pytest.mark.parametrize(
    ("version", "group"), [("gemm", 16), ("gemm", 32), ("gemm", 64), ("gemv", 32), ("gemv", 64)]
)
def test_layers_equal_autoawqs(version: str, group: int) -> None:
    folder = FILES / f"awq-{version}-{group}"
    found = opened(folder, version, group).read("layer.weight")
    assert isinstance(found, QuantizedTensor)
    assert torch.equal(
        found.dequantize(), load_file(folder / "expected.safetensors")["layer.weight"]
    )
    assert found.encoding.scheme.granularity == (PerChannel(0) if group == 64 else PerBlock(group))
    assert not found.encoding.scheme.symmetric


def test_a_layout_read_as_the_other_does_not_fit() -> None:
    with pytest.raises(SourceError, match=r"download the model again"):
        opened(FILES / "awq-gemm-32", "gemv").read("layer.weight")


def test_a_whole_row_is_a_group() -> None:
    folder = FILES / "awq-gemm-64"
    found = opened(folder, group_size=-1).read("layer.weight")
    assert isinstance(found, QuantizedTensor)
    assert torch.equal(
        found.dequantize(), load_file(folder / "expected.safetensors")["layer.weight"]
    )


def awq_model(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """A tiny llama whose down_proj is the golden layer; the weights that must come out."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    name = "model.layers.0.mlp.down_proj"
    tensors = load_file(folder / "model.safetensors")
    weights = {key: value for key, value in tensors.items() if key != f"{name}.weight"}
    golden = load_file(FILES / "awq-gemm-32" / "model.safetensors")
    save_file(
        {
            **weights,
            **{
                f"{name}.{part}": golden[f"layer.{part}"]
                for part in ("qweight", "qzeros", "scales")
            },
        },
        folder / "model.safetensors",
    )
    record = json.loads((folder / "config.json").read_text())
    record["quantization_config"] = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
        **settings,
    }
    (folder / "config.json").write_text(json.dumps(record))
    return {
        **weights,
        f"{name}.weight": load_file(FILES / "awq-gemm-32" / "expected.safetensors")["layer.weight"],
    }


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    expected = awq_model(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == expected.keys()
    for name, value in expected.items():
        found = checkpoint.read(name)
        assert isinstance(found, QuantizedTensor) == name.endswith("down_proj.weight")
        assert torch.equal(
            found.dequantize() if isinstance(found, QuantizedTensor) else found, value
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"version": "gemv_fast"}, "AWQ layout 'gemv_fast' is not supported; gemm and gemv are"),
        ({"version": "marlin"}, "AWQ layout 'marlin'"),
        ({"bits": 8}, "bits is 8, but AWQ files have 4 bits"),
        ({"group_size": 0}, "group_size is 0, but must be a positive integer"),
        ({"group_size": None}, "group_size is None"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    awq_model(tmp_path, **settings)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"qzeros": None},
            r"layer 'layer' \(AWQ\): .*\[\].* must be matrices",
        ),
        (
            {"scales": torch.full((2, 32), -1.0)},
            r"layer 'layer' \(AWQ\): a scale is a finite positive number, but 64 of 64 are not, -1.0 the first",
        ),
        ({"scales": torch.full((2, 32), torch.inf)}, "a scale is a finite positive number"),
        ({"scales": torch.ones(4, 32)}, r"scales' is F32 \[4, 32\], but .* \[2, 32\]"),
        (
            {"qweight": torch.zeros(63, 4, dtype=torch.int32)},
            "groups of 32 do not divide rows of 63",
        ),
        (
            {"qweight": torch.zeros(48, 4, dtype=torch.int32)},
            "groups of 32 do not divide rows of 48",
        ),
        ({"qweight": torch.zeros(64, 4, dtype=torch.int16)}, "qweight' is I16"),
        ({"qweight": torch.zeros(64, 4, 1, dtype=torch.int32)}, "must be matrices"),
    ],
)
def test_damaged_layers(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    held = load_file(FILES / "awq-gemm-32" / "model.safetensors") | {
        f"layer.{part}": tensor for part, tensor in parts.items()
    }
    save_file(
        {name: tensor for name, tensor in held.items() if tensor is not None},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(SourceError, match=message):
        opened(tmp_path).read("layer.weight")
