"""Small models whose forward does something between the output head and the loss, or elsewhere."""

from collections.abc import Callable

import torch
import transformers as t
from transformers import PreTrainedModel

from conftest import ARCHITECTURES, VOCABULARY, tiny_model

IDS = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **IDS}
SMALL = {**SIZES, "intermediate_size": 48}
EAGER = {"attn_implementation": "eager"}
CAPPED = {**SMALL, "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 2.0}
ROUTED = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 4}
ROUTED |= {"output_router_logits": True, "router_aux_loss_coef": 0.5}
LOGIT_CHANGES: dict[str, Callable[[], PreTrainedModel]] = {
    "soft cap": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**CAPPED, tie_word_embeddings=False)),
    "divided": lambda: t.GraniteForCausalLM(t.GraniteConfig(**SMALL, logits_scaling=3.0)),
    "multiplied": lambda: t.CohereForCausalLM(t.CohereConfig(**SMALL, logit_scale=0.3)),
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    "router": lambda: t.MixtralForCausalLM(t.MixtralConfig(**ROUTED)),
    "projected": lambda: t.OPTForCausalLM(t.OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=16)),
    "other head": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL, **EAGER)),
}


def built(name: str) -> PreTrainedModel:
    """A model by its name here, or by its architecture."""
    if name in ARCHITECTURES:
        return tiny_model(name)
    torch.manual_seed(0)
    return {**LOGIT_CHANGES, **OTHERS}[name]().eval()


def mixture(layers: int = 1) -> PreTrainedModel:
    """A model with four fused experts per layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    return t.MixtralForCausalLM(t.MixtralConfig(**sizes, **heads, vocab_size=VOCABULARY)).eval()
