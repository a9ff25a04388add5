"""A base as a `Checkpoint`: it is reproduced exactly, and changed or missing tensors are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import byte_tokenizer, reseal, tiny_model
from formats.models import edit_json, edit_tensors, read_floats, read_integers
from qwlora import fingerprint, load_base, quantize_, save_base
from qwlora.errors import FingerprintError, SourceError
from qwlora.formats.assemble_model import load_precomputed
from qwlora.formats.base_files import BaseCheckpoint
from qwlora.formats.open_checkpoint import open_checkpoint
from qwlora.grid.scheme import parse_scheme
from qwlora.quantize.layer_rules import LayerRule

UP = "model.layers.0.mlp.up_proj"
RULES = [
    LayerRule("*.q_proj", parse_scheme("w3-block32-asymmetric")),
    LayerRule("*.up_proj", parse_scheme("w4-lpbq16")),
    LayerRule("*.v_proj", None),
    LayerRule("*.k_proj", parse_scheme("w8-channel")),
    LayerRule("model.embed_tokens", parse_scheme("w6-block8")),
]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    quantize_(model, "w4-block32", "rtn", rules=RULES)
    save_base(model, tmp_path, byte_tokenizer(), source="somewhere")
    return tmp_path


def test_the_same_base_comes_out(base: Path) -> None:
    checkpoint, expected = open_checkpoint(base), load_base(base)
    assert isinstance(checkpoint, BaseCheckpoint)
    found = load_precomputed(checkpoint)
    assert fingerprint(found) == fingerprint(expected)
    ids = torch.arange(20).view(1, -1)
    assert torch.equal(found(ids).logits, expected(ids).logits)
    read_integers(checkpoint, f"{UP}.weight")
    read_floats(checkpoint, "model.layers.0.self_attn.v_proj.weight")


def test_what_changed_is_named(base: Path) -> None:
    path, name = base / "base.safetensors", f"{UP}.packed"
    edit_tensors(path, {name: load_file(path)[name] ^ 1})
    checkpoint = BaseCheckpoint(base)
    checkpoint.read("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(FingerprintError, match=rf"{name} changed after saving"):
        checkpoint.read(f"{UP}.weight")


def test_parts_that_do_not_fit_are_named(base: Path) -> None:
    path, name = base / "base.safetensors", f"{UP}.block_scale"
    block_scale = load_file(path)[name]
    edit_tensors(path, {name: None})
    with pytest.raises(
        SourceError,
        match=rf"{name} is missing, but int4 .* block 16 with int4 scales needs \[128, 2\]; quantize",
    ):
        BaseCheckpoint(base).read(f"{UP}.weight")
    edit_tensors(path, {name: block_scale})
    layers = json.loads((base / "base.json").read_text())["layers"]
    layers[UP]["shape"] = [128, 32]
    edit_json(base / "base.json", layers=layers)
    reseal(base, "base.json")
    with pytest.raises(SourceError, match=rf"{UP}.packed is \[128, 32\], but .* needs \[128, 16\]"):
        BaseCheckpoint(base).read(f"{UP}.weight")


def test_names_and_encodings_that_there_are_none_of(base: Path) -> None:
    with pytest.raises(SourceError, match="there is no tensor 'other'"):
        BaseCheckpoint(base).read("other")
    with pytest.raises(SourceError, match=r"is quantized already \(a base\)"):
        open_checkpoint(base, encodings="x")
