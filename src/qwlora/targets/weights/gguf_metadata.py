"""What a GGUF file says about a model: sizes, rotary positions, attention.

llama.cpp reads these under the keys of the `gguf` package. The rest of an architecture is fixed in
its code (activation, attention scale, layers without positions); `check_config` compares that with
the configuration, so that nothing is computed differently.

    rope_type     stored as
    linear        rope.scaling.type, .factor
    yarn          the same, and .original_context_length
    llama3        rope_freqs.weight: what each frequency is divided by
    longrope      rope_factors_long.weight, rope_factors_short.weight, rope.scaling.attn_factor

Source: `src/models/` of llama.cpp (b11739).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwlora.errors import ExportError, QwloraWarning, listed
from qwlora.formats.gguf.tensor_names import ARCHITECTURES
from qwlora.system.optional_packages import require

gguf = require("gguf", "gguf")
_SIZES = {  # what GGUF calls the settings of transformers
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "head_count": "num_attention_heads",
    "head_count_kv": "num_key_value_heads",
    "layer_norm_rms_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_UNBIASED = {"attention_bias": False, "mlp_bias": False}
_OTHERS = {"hidden_act": "silu", **_UNBIASED}
_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh",
    "use_bidirectional_attention": None,
    **_UNBIASED,
}
_FIXED: dict[str, dict[str, Any]] = {  # in llama.cpp's code
    "llama": {"hidden_act": "silu"},
    "gemma2": {**_GEMMA, "tie_word_embeddings": True},
    "gemma3": {**_GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None},
}
_LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of Gemma 27B, whose attention scale differs
_ROPE = "type rope_type rope_theta partial_rotary_factor factor original_max_position_embeddings"
_ROTATIONS = {  # and what else llama.cpp has room for, by rope_type
    "default": (),
    "linear": (),
    "yarn": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("attention_factor", "long_factor", "short_factor"),
}
_ONLY_IN = {"llama3": "llama", "longrope": "phi3"}  # rope_types of one architecture


def check_config(config: Any) -> None:
    """Raise an ExportError if llama.cpp does not support a model or would compute it
    differently."""
    model_type = config.model_type
    kind = ARCHITECTURES.get(model_type)
    if kind is None:
        raise ExportError(
            f"GGUF files are written for the model types {listed(ARCHITECTURES, 9)}, and this is "
            f"{model_type}; give a GGUF file of the model as source"
        )
    layers = config.num_hidden_layers
    fixed, problems = {**_FIXED.get(kind, _OTHERS)}, []
    if kind in _LARGEST:
        width = config.hidden_size // config.num_attention_heads
        fixed["query_pre_attn_scalar"] = width if layers == _LARGEST[kind] else config.head_dim
        if _period(config) is None:
            problems.append(
                "layer_types do not repeat: sliding_attention, every n-th full_attention"
            )
    if kind == "gemma2" and None in (config.attn_logit_softcapping, config.final_logit_softcapping):
        problems.append("attn_logit_softcapping or final_logit_softcapping is None")
    if kind == "smollm3":  # 1 in layers that rotate
        fixed["no_rope_layers"] = [int(i % 4 != 0) for i in range(1, layers + 1)]
    for key, value in fixed.items():
        found = getattr(config, key, value)
        if found != value and (found or value):
            problems.append(f"{key} is {found}, not {value}")
    whole, local = _rope(config)
    for rope in (whole, local):
        rotation = rope.get("rope_type", "default")
        is_held = rotation == "default" or (rope is not local and rotation in _ROTATIONS)
        names = {*_ROPE.split()}.union(_ROTATIONS.get(rotation, ()))
        if not is_held or _ONLY_IN.get(rotation, kind) != kind:
            problems.append(f"rope_type is {rotation}")
        elif unknown := [key for key in rope if key not in names and rope[key]]:
            problems.append(f"rope_type {rotation} has {listed(unknown)}")
    if problems:
        raise ExportError(
            f"llama.cpp cannot run this {model_type} model: {'; '.join(problems)}. Use another "
            "target, or a GGUF file as model.source"
        )


def add_metadata(writer: Any, config: Any) -> dict[str, Tensor]:
    """Add what describes a model to a writer; returns the tensors that belong to it."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    for key, name in _SIZES.items():
        if (value := getattr(config, name, None)) is not None:
            getattr(writer, f"add_{key}")(value)
    if ARCHITECTURES[config.model_type] in _LARGEST:
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern(_period(config))
    elif 0 < (getattr(config, "sliding_window", 0) or 0) < config.max_position_embeddings:
        warnings.warn(
            f"this model attends to the last {config.sliding_window} tokens, llama.cpp to all: "
            f"outputs differ beyond them. Limit its context: -c {config.sliding_window}",
            QwloraWarning,
            stacklevel=3,
        )
    rope, local = _rope(config)
    rotation, width = rope.get("rope_type"), int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if rotation in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotation))
        writer.add_rope_scaling_factor(rope["factor"])
    if rotation in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rotation not in _ONLY_IN:
        return {}
    scaled, attention_factor = ROPE_INIT_FUNCTIONS[rotation](config, torch.device("cpu"))
    if rotation == "llama3":
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return {"rope_freqs.weight": rope["rope_theta"] ** -exponents / scaled}
    writer.add_rope_scaling_attn_factors(attention_factor)
    return {
        f"rope_factors_{kind}.weight": torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32)
        for kind in ("long", "short")
    }


def _rope(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotary settings of layers with full attention, and of those with a window if these differ."""
    settings = config.rope_parameters
    return settings.get("full_attention", settings), settings.get("sliding_attention", {})


def _period(config: Any) -> int | None:
    """The n > 1 of: every n-th layer has full attention; None if this is not so."""
    is_full = [kind == "full_attention" for kind in config.layer_types]
    period = [*is_full, True].index(True) + 1
    is_regular = is_full == [i % period == 0 for i in range(1, len(is_full) + 1)]
    return period if is_regular and period > 1 else None
