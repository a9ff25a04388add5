"""A config.json with huge counts is refused before transformers expands it; how many positions a
model has, against what it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import byte_tokenizer, packed_model, reseal, tiny_model
from formats.models import edit_json
from qwlora import load_base, save_base
from qwlora.analysis.inspect_model import inspect_source
from qwlora.errors import SourceError
from qwlora.formats.huggingface.model_config import check_positions
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
def test_counts_are_checked_before_transformers_reads_them(tmp_path, record, key, expanded) -> None:
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


ROWS = 16
GPT = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": ROWS}
BERT = {"vocab_size": 99, "hidden_size": 32, "max_position_embeddings": ROWS}
NEO = {**BERT, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
BERT |= {"num_hidden_layers": 1, "num_attention_heads": 2}
WIDE = {**BERT, "intermediate_size": 32}
TABLES: dict[str, dict[str, Any]] = {
    "gpt2": GPT,
    "opt": {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 32},
    "bert": {**WIDE, "is_decoder": True},
    "gpt_neo": NEO,
    "gpt_bigcode": GPT,
    "openai-gpt": GPT,
    "gptj": {**GPT, "rotary_dim": 8},
    "ctrl": {**GPT, "dff": 32},
}


def empty(kind: str, **settings: Any) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_ends_where_the_model_fails(kind: str) -> None:
    config = AutoConfig.for_model(kind, **TABLES[kind])
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, ROWS + 4)[None]
    with torch.no_grad():
        model(ids[:, :ROWS], use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, use_cache=False)
    found = empty(kind, **TABLES[kind])
    assert check_positions(found, ROWS) is None
    with pytest.raises(SourceError, match=r"17 tokens, .*: set data.sequence_tokens to 16"):
        check_positions(found, ROWS + 1)


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {**LINEAR, "rope_type": "yarn"}
LLAMA3 = {**LINEAR, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {**LINEAR, "rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
del LONG["factor"]


def rope(scaling: dict[str, Any], original: int | None = None) -> tuple[str, dict[str, Any]]:
    more = {"original_max_position_embeddings": original} if original else {}
    return "qwen2", {**WIDE, "rope_scaling": {**scaling, **more}}


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
LAYERS = {"full_attention": LINEAR, "sliding_attention": PLAIN}
TWO_KINDS = {**WIDE, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}


@pytest.mark.parametrize(
    ("model", "reach"),
    [
        (("llama", WIDE), 16),
        (("falcon", BERT), 16),
        (("bloom", {"vocab_size": 99, "hidden_size": 32, "n_layer": 1, "n_head": 2}), None),
        (rope(LINEAR), 64),
        (rope(YARN), 64),
        (rope(YARN, 16), 64),
        # the stated count is the scaled one, as in Llama 3.1
        (rope(LLAMA3, 2), 16),
        (rope(LLAMA3, 8), 32),
        (rope(LONG, 4), 16),
        (rope(LONG, 16), None),
        (rope(LONG), None),
        (rope({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), None),
        # layers of two kinds reach as far as the further
        (("gemma3_text", {**TWO_KINDS, "rope_parameters": LAYERS}), 64),
    ],
)
def test_computed_positions_warn(model: tuple[str, dict[str, Any]], reach: int | None) -> None:
    found = empty(model[0], **model[1])
    assert check_positions(found, reach or 10**6) is None
    if reach is not None:
        assert f"has positions for {reach} (max_pos" in str(check_positions(found, reach + 1))
