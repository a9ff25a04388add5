"""The program on docs/aimet-guide.md does what AIMET's guide says, step by step."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qwlora
from conftest import text

PAGE = Path(__file__).parent.parent / "docs" / "aimet-guide.md"


@pytest.fixture(scope="module")
def program(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every name that the page's program defines."""
    names: dict[str, Any] = {
        "model_id": str(checkpoints["llama"]),
        "texts": [text(seed, 12) for seed in range(4)],
        "out": str(tmp_path_factory.mktemp("guide") / "out"),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_training_moves_the_adapter_and_not_the_base(program: Any) -> None:
    assert qwlora.fingerprint(program["model"]) == program["frozen"]
    assert len(program["trained"]) == 8  # two factors of two layers in two blocks
    norms = [
        float(p.detach().norm()) for n, p in program["model"].named_parameters() if "lora_B" in n
    ]
    assert all(norm > 0 for norm in norms)


def test_grids_are_those_that_were_asked_for(program: Any) -> None:
    encodings = program["simulation"].encodings
    bits = {name: encoding.scheme.bitwidth for name, encoding in encodings.items()}
    layer = "model.layers.0.self_attn"
    assert bits[f"{layer}.q_proj.weight"] == 4
    assert bits[f"{layer}.q_proj.lora_A.weight"] == bits[f"{layer}.q_proj.lora_B.weight"] == 8
    assert bits[f"{layer}.q_proj.lora_A.linear"] == bits[f"{layer}.v_proj.lora_B.linear"] == 8
    assert bits[f"{layer}.q_proj.mul"] == bits[f"{layer}.v_proj.mul"] == 8
    assert bits[f"{layer}.q_proj.linear"] == bits[f"{layer}.softmax"] == 16
    scaled = encodings[f"{layer}.q_proj.mul"]
    low = float(scaled.offset * scaled.scale)
    high = float((scaled.offset + 2**8 - 1) * scaled.scale)
    assert (low, high) == pytest.approx((-1, 2), abs=0.01)


def test_calibration_keeps_the_bases_encodings(program: Any) -> None:
    simulation = program["simulation"]
    for name, encoding in simulation.base_encodings.items():
        assert simulation.encodings[name] is encoding


def test_what_is_delivered_computes_what_was_simulated(program: Any) -> None:
    expected = program["simulation"].outputs(program["example"])["logits"]
    assert torch.equal(program["logits"].argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(program["logits"], expected, atol=0.02, rtol=1e-3)
