"""MLX folders equal what MLX dequantizes and mlx-lm computes (files/mlx-*)."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from formats.models import edit_json, edit_tensors, read_integers
from qwlora.errors import SourceError
from qwlora.formats.huggingface.gptq_awq_mlx import MlxTensors
from qwlora.formats.huggingface.safetensors_files import SafetensorsFiles
from qwlora.formats.model_source import locate
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint

FILES = Path(__file__).parents[1] / "files"


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_layers_equal_mlxs(bits: int, group: int) -> None:
    folder, name = FILES / "mlx-layers", f"w{bits}-{group}.weight"
    tensors = MlxTensors(SafetensorsFiles(folder), {"bits": bits, "group_size": group})
    found = read_integers(tensors, name)
    assert tensors.shape(name) == found.codes.shape
    expected = load_file(folder / "expected.safetensors")[name]
    rounding = torch.finfo(torch.float32).eps * float(expected.abs().max())
    assert float((found.dequantize() - expected).abs().max()) <= 2 * rounding
    assert found.encoding.scheme.bitwidth == bits
    scales = load_file(folder / "model.safetensors")[f"w{bits}-{group}.scales"]
    # MLX writes negative ones, which a grid does not have
    assert bool((scales < 0).any()) or (bits, group) == (3, 128)


def test_a_whole_model_computes_mlx_lms_logits() -> None:
    folder = FILES / "mlx-llama"
    assert not locate(str(folder)).holds_floats
    checkpoint = open_checkpoint(folder)
    embedding = read_integers(checkpoint, "model.embed_tokens.weight")
    assert embedding.encoding.scheme.bitwidth == 8
    expected = load_file(folder / "expected.safetensors")
    with torch.no_grad():
        logits = load_precomputed(checkpoint)(input_ids=expected["tokens"].long()).logits
    assert float((logits - expected["logits"]).abs().max()) < 1e-5


UP, STACK = (f"model.layers.0.mlp.{name}up_proj" for name in ("", "switch_mlp."))
STACKED = {"weight": torch.zeros(2, 8, 8, dtype=torch.uint32), "scales": torch.ones(2, 8, 1)}


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"mode": "mxfp4"}, {}, "mxfp4.*affine"),
        ({"model.embed_tokens": {"mode": "mxfp4"}}, {}, "mxfp4' of 'model.embed_tokens'"),
        ({"bits": 7}, {}, "bits 7.*2, 3, 4, 5, 6, 8"),
        ({"group_size": "64"}, {}, "group_size '64'"),
        ({"bits": 8}, {}, "8 bits in groups of 64: .*config.json"),
        ({}, {f"{UP}.scales": torch.full((128, 1), torch.nan)}, "up_proj.* a scale is a finite"),
        ({}, {f"{STACK}.{part}": t for part, t in STACKED.items()}, r"\[2, 8, 8\].* stacked"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, settings: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    folder = Path(shutil.copytree(FILES / "mlx-llama", tmp_path / "edited"))
    config = json.loads((folder / "config.json").read_text())
    changed = config["quantization"] | settings
    edit_json(folder / "config.json", quantization=changed, quantization_config=None)
    edit_tensors(folder / "model.safetensors", tensors)
    with pytest.raises(SourceError, match=message):
        open_checkpoint(folder).read(f"{UP}.weight")
