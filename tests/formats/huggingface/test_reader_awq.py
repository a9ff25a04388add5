"""AWQ layers equal what AutoAWQ unpacks, bit for bit (files/awq-*)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from formats.models import edit_json, edit_tensors, llama, read_integers
from qwlora.errors import SourceError
from qwlora.formats.huggingface.gptq_awq_mlx import QweightTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import PerBlock, PerChannel, Scheme

FILES = Path(__file__).parents[1] / "files"


def read(
    folder: Path, version: str = "gemm", group_size: Any = 32, **settings: Any
) -> QuantizedTensor:
    settings = {"bits": 4, "version": version, "group_size": group_size, **settings}
    return read_integers(QweightTensors(SafetensorsFiles(folder), settings, "awq"), "layer.weight")


def expected(folder: Path) -> torch.Tensor:
    return load_file(folder / "expected.safetensors")["layer.weight"]


@pytest.mark.parametrize(
    ("version", "group"), [("gemm", 16), ("gemm", 32), ("gemm", 64), ("gemv", 32), ("gemv", 64)]
)
def test_layers_equal_autoawqs(version: str, group: int) -> None:
    folder = FILES / f"awq-{version}-{group}"
    for size in (group, -1) if group == 64 else (group,):  # -1: a whole row is a group
        found = read(folder, version, size)
        assert torch.equal(found.dequantize(), expected(folder))
        granularity = PerChannel(0) if group == 64 else PerBlock(group)
        assert found.encoding.scheme == Scheme(4, False, granularity)


def test_a_layout_read_as_the_other_does_not_fit() -> None:
    with pytest.raises(SourceError, match=r"download the model again"):
        read(FILES / "awq-gemm-32", "gemv")


def awq_model(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """A tiny llama whose down_proj is the golden layer; the weights that must come out."""
    llama(num_hidden_layers=1).save_pretrained(folder)
    name, golden = "model.layers.0.mlp.down_proj", FILES / "awq-gemm-32"
    tensors = load_file(folder / "model.safetensors")
    layer = load_file(golden / "model.safetensors")
    parts = {f"{name}.{part}": layer[f"layer.{part}"] for part in ("qweight", "qzeros", "scales")}
    edit_tensors(folder / "model.safetensors", {f"{name}.weight": None, **parts})
    record = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", **settings}
    edit_json(folder / "config.json", quantization_config=record)
    return {**tensors, f"{name}.weight": expected(golden)}


def test_a_whole_checkpoint(tmp_path: Path) -> None:
    wanted = awq_model(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == wanted.keys()
    for name, value in wanted.items():
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
        ({"qzeros": None}, r"layer 'layer' \(AWQ\): .*\[\].* must be matrices"),
        (
            {"scales": torch.zeros(2, 32)},
            r"layer 'layer' \(AWQ\): a scale is a finite positive number, but 64 of 64 are not, 0.0 the first",
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
    file = tmp_path / "model.safetensors"
    shutil.copy(FILES / "awq-gemm-32" / file.name, file)
    edit_tensors(file, {f"layer.{part}": tensor for part, tensor in parts.items()})
    with pytest.raises(SourceError, match=message):
        read(tmp_path)
