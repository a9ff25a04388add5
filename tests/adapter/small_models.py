"""Small models whose forward does something between the output head and the loss, or elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from conftest import ARCHITECTURES, VOCABULARY, tiny_model

IDS = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    **IDS,
}
LOGIT_CHANGES: dict[str, Callable[[], PreTrainedModel]] = {
    "soft cap": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SMALL,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=2.0,
            tie_word_embeddings=False,
        )
    ),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "router": lambda: MixtralForCausalLM(
        MixtralConfig(
            **SMALL,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
            router_aux_loss_coef=0.5,
        )
    ),
    "projected": lambda: OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            **IDS,
        )
    ),
    "head by another name": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SMALL, attn_implementation="eager")
    ),
}


def built(name: str) -> PreTrainedModel:
    """A model by its name here, or by its architecture."""
    if name in ARCHITECTURES:
        return tiny_model(name)
    torch.manual_seed(0)
    return {**LOGIT_CHANGES, **OTHERS}[name]().eval()
