"""How many positions a model has: against what it computes."""

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from qwlora.errors import SourceError
from qwlora.formats.huggingface.model_config import check_positions

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


LAYERS = {
    "full_attention": LINEAR,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
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
def test_computed_positions_are_spoken_of(
    model: tuple[str, dict[str, Any]], reach: int | None
) -> None:
    found = empty(model[0], **model[1])
    assert check_positions(found, reach or 10**6) is None
    if reach is not None:
        assert f"has positions for {reach} (max_pos" in str(check_positions(found, reach + 1))
