"""No NaN is frozen, wherever in the model it is, and no perplexity is one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import byte_tokenizer, packed_model, tiny_model
from qwlora import quantize_
from qwlora.analysis.token_scores import score_tokens
from qwlora.errors import CalibrationError, NonFiniteError
from qwlora.formats.base_folder import save_base
from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
from qwlora.nn.frozen import check_base_finite, check_finite
from qwlora.quantize.quantize_model import quantize_checkpoint

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize(
    ("tensor", "index", "found"),
    [
        ("model.norm.weight", 3, r"1 values .* first at index \[3\]"),
        ("model.embed_tokens.weight", (5, slice(2, 4)), r"2 values .* first at index \[5, 2\]"),
        ("model.layers.0.mlp.up_proj.scale", 3, "2 values"),
    ],
)
def test_no_nan_is_frozen(tensor: str, index: Any, found: str, tmp_path: Path) -> None:
    floats, packed, base = tiny_model("llama"), packed_model("llama"), tmp_path / "base"
    for model in (floats, packed):
        if tensor in model.state_dict():
            model.state_dict()[tensor][index] = torch.nan
    with pytest.raises(CalibrationError, match=f"{tensor} contains {found}"):
        save_base(packed, base, byte_tokenizer(), source="somewhere")
    assert not (base / "base.json").exists()
    if not tensor.endswith("scale"):
        floats.save_pretrained(tmp_path / "floats")
        checkpoint = FolderCheckpoint(tmp_path / "floats")
        for quantizing in (
            lambda: quantize_(floats, "w4-block32", "rtn"),
            lambda: quantize_checkpoint(
                checkpoint, byte_tokenizer(), base, "x", "w4-block32", "rtn"
            ),
        ):
            with pytest.raises(CalibrationError, match=f"{tensor} contains {found}"):
                quantizing()


def test_nan_and_infinities_are_counted_but_for_the_infinities_of_a_mask() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.tensor([0, torch.nan, torch.inf, -torch.inf], dtype=dtype)
        check_finite("w", values[:1])
        with pytest.raises(CalibrationError, match=r"w contains 3 values .* first at index \[1\]"):
            check_finite("w", values)
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
