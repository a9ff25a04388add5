"""Adapters in the layout of mlx-lm, converted to PEFT's."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from qwlora.adapter.adapter_files import adapter_folder, convert_mlx_adapter
from qwlora.errors import SourceError
from qwlora.pipeline.stages.calibrate import is_covered

MODULES = {"model.layers.0.self_attn.q_proj": 2, "model.layers.0.mlp.up_proj": 4}


def write_mlx(folder: Path, config: dict[str, Any] | None = None, **replaced: Tensor) -> Path:
    """What `mlx_lm.lora` writes: one scale, and factors as they multiply from the left."""
    torch.manual_seed(1)
    model, tensors = tiny_model("llama", layers=1), dict[str, Tensor]()
    for module, rank in MODULES.items():
        out, columns = model.get_submodule(module).weight.shape
        tensors[f"{module}.lora_a"] = torch.randn(columns, rank) / 8
        tensors[f"{module}.lora_b"] = torch.randn(rank, out) / 8
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors | replaced, folder / "adapters.safetensors")
    given = {
        "fine_tune_type": "lora",
        "model": "somebody/model",
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0},
        **(config or {}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(given))
    return folder


@pytest.mark.parametrize(
    ("config", "tensors", "problem"),
    [
        ({"fine_tune_type": "dora"}, {}, "type dora; only lora"),
        ({"lora_parameters": {"rank": 4}}, {}, r"adapter_config\.json of mlx-lm .*scale"),
        ({}, {"lm_head.m": torch.ones(3)}, r"missing or unknown: lm_head\.lora_a, .*lm_head\.m"),
        ({}, {"model.layers.0.mlp.up_proj.lora_b": torch.ones(3, 128)}, r"lora_b \[3, 128\]"),
    ],
)
def test_what_cannot_be_converted_is_named(
    config: dict[str, Any], tensors: dict[str, Tensor], problem: str, tmp_path: Path
) -> None:
    source = write_mlx(tmp_path / "mlx", config, **tensors)
    with pytest.raises(SourceError, match=problem):
        convert_mlx_adapter(source, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlx"]
    (source / "adapters.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(SourceError, match=r"cannot be read"):
        convert_mlx_adapter(source, tmp_path)


def test_an_adapter_saved_by_mlx_lm_computes_its_logits(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "formats" / "files" / "mlx-adapter"
    convert_mlx_adapter(folder, tmp_path)
    expected = load_file(folder / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokens = expected["tokens"].long()
    with torch.no_grad():
        base = model(input_ids=tokens).logits
        logits = PeftModel.from_pretrained(model, tmp_path)(input_ids=tokens).logits
    assert float((logits - expected["logits"]).abs().max()) < 1e-5
    assert float((logits - base).abs().max()) > 1e-2


def test_a_source_is_converted_again_when_it_changes(tmp_path: Path) -> None:
    source = write_mlx(tmp_path / "mlx")
    assert is_covered(str(source), ["all-linear"])
    assert not is_covered(str(source), [["o_proj"]])
    assert not is_covered(str(tmp_path), ["all-linear"])
    first = adapter_folder(str(source))
    assert adapter_folder(str(source)) == first != source
    write_mlx(source, {"lora_parameters": {"rank": 4, "scale": 1.0}})
    assert adapter_folder(str(source)) != first
    assert {p.name for p in source.iterdir()} == {"adapter_config.json", "adapters.safetensors"}
