"""No NaN is frozen, wherever in the model it is, and no perplexity is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora import quantize_
from qwlora.analysis.token_scores import score_tokens
from qwlora.errors import CalibrationError, NonFiniteError
from qwlora.formats.base_folder import save_base
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.nn.frozen import check_base_finite, check_finite
from qwlora.quantize.quantize_model import quantize_checkpoint

IDS = torch.arange(24).view(2, 12)
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"


def with_nan(tensor: str, index: Any) -> PreTrainedModel:
    model = tiny_model("llama")
    model.get_parameter(tensor).data[index] = torch.nan
    return model


@pytest.mark.parametrize(
    ("tensor", "index", "found"),
    [
        (NORM, 3, r"1 values .* first at index \[3\]"),
        (EMBEDDING, (5, slice(2, 4)), r"2 values .* first at index \[5, 2\]"),
    ],
)
def test_no_nan_is_frozen(tensor: str, index: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=f"{tensor} contains {found}"):
        quantize_(with_nan(tensor, index), "w4-block32", "rtn")
    model = packed_model("llama")
    model.get_parameter(tensor).data[index] = torch.nan
    (tmp_path / "base").mkdir()
    with pytest.raises(CalibrationError, match=f"{tensor} contains {found}"):
        save_base(model, tmp_path / "base", byte_tokenizer(), source="somewhere")
    assert not (tmp_path / "base" / "base.json").exists()
    model = packed_model("llama")
    model.get_submodule("model.layers.0.mlp.up_proj").scale[3] = torch.inf
    with pytest.raises(CalibrationError, match=r"up_proj\.scale contains \d+ values"):
        save_base(model, tmp_path / "base")
    with_nan(tensor, index).save_pretrained(tmp_path / "floats")
    checkpoint, tokenizer = FolderCheckpoint(tmp_path / "floats"), byte_tokenizer()
    with pytest.raises(CalibrationError, match=f"{tensor} contains {found}"):
        quantize_checkpoint(checkpoint, tokenizer, tmp_path / "base", "x", "w4-block32", "rtn")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinities_are_counted(dtype: torch.dtype) -> None:
    values = torch.zeros(4, dtype=dtype)
    check_finite("w", values)
    values[1], values[2], values[3] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(CalibrationError, match=r"w contains 3 values .* first at index \[1\]"):
        check_finite("w", values)


def test_a_mask_of_infinities_in_a_buffer_is_no_error() -> None:
    module = nn.Linear(2, 2)
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    check_base_finite(module)
    module.register_buffer("mask", torch.tensor([0.0, torch.nan]))
    with pytest.raises(CalibrationError, match=r"mask contains 1 values .* first at index \[1\]"):
        check_base_finite(module)


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "sequence 2 of 2 .* is nan"), (2e3, "sequence 1 of 2 .* no perplexity")],
)
def test_a_perplexity_that_is_no_number_names_what_was_measured(value: float, message: str) -> None:
    def logits(ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(1, ids.shape[1], 260)
        out[..., 0] = value if ids[0, 0] or value == 2e3 else 0.0
        return out

    with pytest.raises(NonFiniteError, match=f"perplexity, float: .*{message}"):
        score_tokens(logits, IDS + (IDS >= 12), "perplexity, float")
