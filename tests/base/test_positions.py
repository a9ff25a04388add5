"""How many positions a model has: against what it computes."""

from __future__ import annotations

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
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from qwlora.base.positions import check_positions
from qwlora.errors import SourceError

GPT: dict[str, Any] = {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
BERT: dict[str, Any] = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 16}
WIDE: dict[str, Any] = {**BERT, "intermediate_size": 32}
TABLES: dict[str, tuple[PreTrainedConfig, str, int]] = {
    "gpt2": (GPT2Config(**GPT), "transformer.wpe", 16),
    "opt": (OPTConfig(**BERT, ffn_dim=32, word_embed_proj_dim=32), "model.decoder.embed_positions", 16),
    "bert": (BertConfig(**WIDE, is_decoder=True), "bert.embeddings.position_embeddings", 16),
    "roberta": (RobertaConfig(**WIDE, is_decoder=True), "roberta.embeddings.position_embeddings", 14),
    "neo": (GPTNeoConfig(vocab_size=99, hidden_size=32, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], max_position_embeddings=16), "wpe", 16),
    "bigcode": (GPTBigCodeConfig(**GPT), "transformer.wpe", 16),
    "openai": (OpenAIGPTConfig(**GPT), "transformer.positions_embed", 16),
    "gptj": (GPTJConfig(**GPT, rotary_dim=8), "rotary_emb.embed_positions", 16),
    "ctrl": (CTRLConfig(**GPT, dff=32), "transformer.pos_encoding", 16),
}


def empty(config: PreTrainedConfig) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_ends_where_the_model_fails(kind: str) -> None:
    config, name, rows = TABLES[kind]
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, rows + 4)[None]
    with torch.no_grad():
        model(ids[:, :rows], use_cache=False)
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, use_cache=False)
    assert check_positions(empty(config), rows) is None
    with pytest.raises(
        SourceError, match=rf"have {rows + 1} tokens, but .* has positions for {rows} \(the table .*{name}\): set data.sequence_tokens to {rows}"
    ):
        check_positions(empty(config), rows + 1)


@pytest.mark.parametrize("config", [LlamaConfig(**WIDE), FalconConfig(**BERT)], ids=["llama", "falcon"])
def test_computed_positions_are_spoken_of(config: PreTrainedConfig) -> None:
    model = empty(config)
    assert check_positions(model, 16) is None
    assert "has positions for 16 (max_position_embeddings) and computes the others" in str(check_positions(model, 17))


def test_a_model_without_positions_has_no_end() -> None:
    assert check_positions(empty(BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=2)), 1000) is None
