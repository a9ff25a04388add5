"""A small config.json with huge counts is refused before transformers expands it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from conftest import byte_tokenizer, packed_model, reseal, tiny_model
from formats.models import edit_json
from qwlora import load_base, save_base
from qwlora.analysis.inspect_model import inspect_source
from qwlora.errors import SourceError
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.formats.open_checkpoint import open_checkpoint

MANY = 10**6  # a list of 8 MB, were it expanded


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What transformers was given to expand."""
    calls: list[Any] = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda folder, **_: calls.append(folder))
    return calls


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"model_type": "qwen3", "num_hidden_layers": MANY}, "num_hidden_layers"),
        ({"model_type": "gpt2", "n_layer": MANY}, "n_layer"),
        ({"model_type": "bart", "decoder_layers": MANY}, "decoder_layers"),
        ({"text_config": {"num_hidden_layers": MANY}}, "text_config.num_hidden_layers"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], MANY]]}, "attention_types"),
        ({"model_type": "llama", "num_labels": MANY}, "num_labels"),
        ({"configuration_files": ["config.4.0.0.json"]}, "num_hidden_layers"),
    ],
)
def test_counts_are_checked_before_transformers_reads_them(
    tmp_path: Path, record: dict[str, Any], key: str, expanded: list[Any]
) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "config.4.0.0.json").write_text(json.dumps({"num_hidden_layers": MANY}))
    for opening in (open_checkpoint, load_model, load_tokenizer):
        with pytest.raises(SourceError, match=f"{key} is {MANY}"):
            opening(str(tmp_path))
    assert not expanded


def test_counts_of_a_base(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_base(packed_model("llama"), tmp_path, byte_tokenizer(), source="somewhere")
    edit_json(tmp_path / "config.json", num_hidden_layers=MANY)
    reseal(tmp_path, "base.json")
    expanded = request.getfixturevalue("expanded")
    for opening in (load_base, open_checkpoint, inspect_source):
        with pytest.raises(SourceError, match="num_hidden_layers is 1000000"):
            opening(str(tmp_path))
    assert not expanded


def test_counts_that_models_have(tmp_path: Path) -> None:
    """A count of layers that are not in the files, and large numbers that count nothing."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    edit_json(config, max_window_layers=94, vocabulary={"size": MANY})
    assert open_checkpoint(tmp_path).names()
    edit_json(config, num_hidden_layers=120)
    with pytest.raises(SourceError, match=r"layers.2.self_attn.q_proj.weight', .* missing from"):
        open_checkpoint(tmp_path)
