"""Read a model's config.json with a check of its counts, and check sequence lengths against it.

max_position_embeddings, no rope_parameters    a table with one row per position (GPT-2, OPT,
                                               BERT, GPT-J's sines): a hard limit
with rope_parameters                           rotary, computed for any position: longer
                                               sequences run, but were not trained
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwlora.errors import QwloraError, SourceError, foreign_as, listed

# Pattern of keys, lowest and highest value. While transformers reads a configuration, it expands
# some numbers: `num_hidden_layers` into a list of layer types, `num_labels` into label names. So a
# config.json of 1 KB could fill the memory before any model is built.
_COUNTS = (
    # -1 is "none" in some configurations.
    (r".*(layers|blocks|depths?|_dense_replace)|n_layer|num_layer|attention_types", -1, 1000),
    ("num_labels", 0, 300_000),
    # Above 10^8, products of two counts do not fit in memory.
    ("hidden_size|vocab_size|num_attention_heads|num_key_value_heads", 1, 10**8),
)
# Pattern of keys, and the names that they may have unless the model has its own code.
_NAMES: tuple[tuple[str, Collection[str]], ...] = (
    ("hidden_act(ivation)?|activation_function|feed_forward_act", ACT2FN.keys()),
    # `axial` is that of vision towers, which compute it themselves.
    ("rope_type", {"default", "axial", *ROPE_INIT_FUNCTIONS}),
    ("(torch_)?dtype", {"auto", *(n for n, v in vars(torch).items() if type(v) is torch.dtype)}),
)
# What transformers' errors mean, by words in them.
_MEANINGS = {
    "trust_remote_code": (
        "it needs Python code from its own folder (auto_map in config.json or "
        "tokenizer_config.json), and QWLoRA does not run it by default. Read the code; if you "
        "trust it, set model.trust_remote_code: true in the recipe"
    ),
    "ignore_mismatched_sizes": (
        "its files hold tensors of other shapes than config.json describes. Compare hidden_size, "
        "intermediate_size, vocab_size and the numbers of heads in config.json with the original, "
        "or download the model again"
    ),
}
_UNSCALED = ("default", "axial", "proportional")  # rope types without a scaling factor


def read_config(folder: Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration, without its entries about weight files (`quantization_config`,
    `transformers_weights`).

    Raises:
        SourceError: config.json is missing or unreadable, has a count that no model has, or
            transformers does not know the model type.
    """
    check_values(folder)
    with loading(f"{str(folder)!r}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    use_default_implementations_(config)
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config", "transformers_weights"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def use_default_implementations_(config: PretrainedConfig) -> None:
    """Forget which attention and experts a configuration asks for."""
    # It may name a kernel, which transformers would download from the hub and run.
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if isinstance(part, PretrainedConfig):
            part._attn_implementation_internal = None
            part._experts_implementation_internal = None


def check_values(folder: Path) -> None:
    """Refuse a config.json with counts or names that no model has; the message names the key."""
    with loading(f"{str(folder)!r}: config.json cannot be read"):
        # Reads the file that AutoConfig reads: config.json can redirect to another one.
        settings, _ = PretrainedConfig.get_config_dict(folder)
    entries: list[tuple[str, str, Any]] = [("", "", settings)]  # dotted path, last key, value
    while entries:
        path, key, value = entries.pop()
        problem = ""
        if isinstance(value, Mapping):
            entries += [(f"{path}.{name}".lstrip("."), str(name), v) for name, v in value.items()]
        elif isinstance(value, list):
            entries += [(path, key, item) for item in value]
        elif isinstance(value, float) and math.isnan(value):
            problem = "which is not a number"
        elif type(value) is int:
            for pattern, low, high in _COUNTS:
                if not low <= value <= high and re.fullmatch(pattern, key):
                    problem = f"but models have {max(low, 0)} to {high:,}"
        elif isinstance(value, str) and "auto_map" not in settings:
            for pattern, known in _NAMES:
                if re.fullmatch(pattern, key) and value.removeprefix("torch.") not in known:
                    problem = f"and transformers knows {listed(sorted(known), 40)}"
        if problem:
            raise SourceError(
                f"{str(folder / 'config.json')!r}: {path} is {value!r}, {problem}. Correct it, or "
                "download the model again"
            )


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Raise any error inside as a SourceError `what: the error`; some get a clearer message."""
    with foreign_as(SourceError, what):
        try:
            yield
        except QwloraError:
            raise
        except (ValueError, RuntimeError) as error:
            for words, meaning in _MEANINGS.items():
                if words in str(error):
                    raise SourceError(f"{what}: {meaning}") from error
            raise


def check_positions(model: PreTrainedModel, count: int) -> str | None:
    """Check that sequences of `count` tokens have positions.

    Returns:
        A warning if `count` exceeds the length that the model was trained on, else None. Also None
        if rotary positions are scaled to a length that the configuration does not state.

    Raises:
        SourceError: the model has a table of positions with fewer than `count` rows.
    """
    config: Any = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    rows = stated
    rope = getattr(config, "rope_parameters", None) or {}
    # `max_position_embeddings` is the scaled length in some configurations (Llama 3.1) and the
    # unscaled one in others (Qwen2.5 with YaRN): the larger of it and factor * original is the
    # limit. There is either one dictionary for each type of layer, or a single one.
    for part in [part for part in rope.values() if isinstance(part, dict)] or [rope]:
        kind, factor = part.get("rope_type", "default"), part.get("factor")
        original = part.get("original_max_position_embeddings") or stated
        if kind == "dynamic" or (factor is None and kind not in _UNSCALED and original >= stated):
            return None
        rows = max(rows, int((factor or 1) * original))
    if count <= rows:
        return None
    sentence = (
        f"sequences have {count} tokens, but {type(model).__name__} has positions for {rows} "
        f"(max_position_embeddings{'' if rows == stated else f' {stated}, scaled'})"
    )
    if not rope:
        raise SourceError(f"{sentence}: set data.sequence_tokens to {rows} or less")
    return (
        f"{sentence}. It was not trained on longer sequences; expect worse results, or lower "
        "data.sequence_tokens"
    )
