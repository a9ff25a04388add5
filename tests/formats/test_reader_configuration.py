"""A small config.json with huge layer counts is refused before transformers expands it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from conftest import byte_tokenizer, reseal, tiny_model
from qwlora import load_base, quantize_, save_base
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


def write(folder: Path, record: dict[str, Any], files: dict[str, Any] | None = None) -> Path:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    for name, content in {"config.json": record, **(files or {})}.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"model_type": "qwen3", "num_hidden_layers": MANY}, "num_hidden_layers"),
        ({"model_type": "gemma2", "num_hidden_layers": MANY}, "num_hidden_layers"),
        ({"model_type": "gpt2", "n_layer": MANY}, "n_layer"),
        ({"model_type": "bart", "decoder_layers": MANY}, "decoder_layers"),
        (
            {"model_type": "gemma3", "text_config": {"num_hidden_layers": MANY}},
            "text_config.num_hidden_layers",
        ),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], MANY]]}, "attention_types"),
        ({"model_type": "llama", "num_labels": MANY}, "num_labels"),
    ],
)
def test_counts_are_checked_before_transformers_reads_them(
    tmp_path: Path, record: dict[str, Any], key: str, expanded: list[Any]
) -> None:
    write(tmp_path, record)
    for opening in (
        open_checkpoint,
        lambda folder: load_model(str(folder)),
        lambda folder: load_tokenizer(str(folder)),
    ):
        with pytest.raises(
            SourceError,
            match=rf"config.json': {key} is {MANY}, but a model with these files has \d to [\d,]+\.",
        ):
            opening(tmp_path)
    assert not expanded


def test_the_file_that_config_json_names_is_checked(tmp_path: Path, expanded: list[Any]) -> None:
    other = {"model_type": "qwen3", "num_hidden_layers": MANY}
    write(
        tmp_path,
        {"model_type": "qwen3", "configuration_files": ["config.4.0.0.json"]},
        {"config.4.0.0.json": other},
    )
    with pytest.raises(SourceError, match=f"num_hidden_layers is {MANY}"):
        open_checkpoint(tmp_path)
    assert not expanded


@pytest.mark.parametrize(
    "opening", [load_base, open_checkpoint, lambda folder: inspect_source(str(folder))]
)
def test_counts_of_a_base(
    tmp_path: Path, opening: Callable[[Path], Any], expanded: list[Any]
) -> None:
    model = tiny_model("llama")
    quantize_(model, "w4-block32", "rtn")
    save_base(model, tmp_path, byte_tokenizer(), source="somewhere")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": MANY}))
    reseal(tmp_path, "base.json")
    with pytest.raises(
        SourceError,
        match=f"config.json': num_hidden_layers is {MANY}, but .* has 0 to 128",
    ):
        opening(tmp_path)
    assert not expanded


def test_more_parameters_than_files_hold(tmp_path: Path) -> None:
    """A count that honest files may have, of layers that are not there."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 120}))
    with pytest.raises(
        SourceError,
        match=r"'model.layers.2.self_attn.q_proj.weight', .* missing from the files, but needed",
    ):
        open_checkpoint(tmp_path)


def test_counts_of_what_is_not_there_are_no_reason_to_refuse(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "max_window_layers": 94, "vocabulary": {"size": MANY}})
    )
    assert open_checkpoint(tmp_path).names()
