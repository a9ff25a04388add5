"""How many positions a model has: against what it computes."""

from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    CTRLConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from qwlora.errors import SourceError
from qwlora.formats.huggingface.model_config import check_positions

ROWS = 16
GPT: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2}
GPT |= {"n_positions": ROWS}
BERT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "max_position_embeddings": ROWS}
NEO = {**BERT, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}
BERT |= {"num_hidden_layers": 1, "num_attention_heads": 2}
WIDE: dict[str, Any] = {**BERT, "intermediate_size": 32}
TABLES: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(**GPT),
    "opt": OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=32),
    "bert": BertConfig(**WIDE, is_decoder=True),
    "neo": GPTNeoConfig(**NEO),
    "bigcode": GPTBigCodeConfig(**GPT),
    "openai": OpenAIGPTConfig(**GPT),
    "gptj": GPTJConfig(**GPT, rotary_dim=8),
    "ctrl": CTRLConfig(**GPT, dff=32),
}


def empty(config: PreTrainedConfig) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_ends_where_the_model_fails(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(TABLES[kind]).eval()
    ids = torch.arange(3, ROWS + 4)[None]
    with torch.no_grad():
        model(ids[:, :ROWS], use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, use_cache=False)
    assert check_positions(empty(TABLES[kind]), ROWS) is None
    facts = r"have 17 tokens, but .* for 16 \(max_pos.*\): set data.sequence_tokens to 16"
    with pytest.raises(SourceError, match=facts):
        check_positions(empty(TABLES[kind]), ROWS + 1)


def test_computed_positions_are_spoken_of() -> None:
    facts = "has positions for 16 (max_position_embeddings). It was not trained on longer"
    for config in (LlamaConfig(**WIDE), FalconConfig(**BERT)):
        model = empty(config)
        assert check_positions(model, ROWS) is None
        assert facts in str(check_positions(model, ROWS + 1))
    without = empty(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2))
    assert check_positions(without, 1000) is None


LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {**LINEAR, "rope_type": "yarn"}
LLAMA3 = {**LINEAR, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("rope", "reach"),
    [
        (LINEAR, 64),
        (YARN, 64),
        ({**YARN, "original_max_position_embeddings": 16}, 64),
        # the stated count is the scaled one, as in Llama 3.1
        ({**LLAMA3, "original_max_position_embeddings": 2}, 16),
        ({**LLAMA3, "original_max_position_embeddings": 8}, 32),
        ({**LONG, "original_max_position_embeddings": 4}, 16),
        ({**LONG, "original_max_position_embeddings": 16}, None),
        (LONG, None),
        ({"rope_type": "dynamic", "factor": 2.0}, None),
    ],
)
def test_scaled_positions_reach_further(rope: dict[str, Any], reach: int | None) -> None:
    model = empty(Qwen2Config(**WIDE, rope_scaling={**rope, "rope_theta": 1e4}))
    assert model.config.rope_parameters["rope_type"] == rope["rope_type"]
    if reach is None:
        assert check_positions(model, 10**6) is None
    else:
        assert check_positions(model, reach) is None
        origin = "max_position_embeddings" if reach == 16 else "max_position_embeddings 16, scaled"
        assert f"has positions for {reach} ({origin}). It was not trained on longer" in str(
            check_positions(model, reach + 1)
        )


def test_layers_of_two_kinds_reach_as_far_as_the_further() -> None:
    layers = {
        "full_attention": {**LINEAR, "rope_theta": 1e4},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    sizes = {**WIDE, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16}
    model = empty(Gemma3TextConfig(**sizes, rope_parameters=layers))
    assert check_positions(model, 64) is None
    assert "has positions for 64" in str(check_positions(model, 65))
