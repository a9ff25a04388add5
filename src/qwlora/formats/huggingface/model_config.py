"""Reading a model's config.json after checking the counts that transformers would choke on.

While transformers reads a configuration, it expands some numbers: `num_hidden_layers` into a list
of layer types, `num_labels` into label names. A config.json of 1 KB can therefore fill the memory
before any model is built. So counts are first compared with the number of stored tensors, because
every layer has at least one. Other values that no model has get an error that names their key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwlora.errors import SourceError, foreign_as

FEW = 128  # lowest limit: valid configurations of small models contain such numbers too
MOST = 10_000  # layers, if the number of tensors is not known
# Pattern of keys, lowest and highest value; the highest number of layers is an argument.
_COUNTS: tuple[tuple[str, int, int | None], ...] = (
    (
        r".*(layers|blocks|depths?|_dense_replace)|n_layer|num_layer|attention_types",
        -1,  # "none" in some configurations
        None,
    ),
    ("num_labels", 0, 300_000),  # one tensor holds all labels
    # above 10^8, products of two counts do not fit in memory
    ("hidden_size|vocab_size|num_attention_heads|num_key_value_heads", 1, 10**8),
)
_ACTIVATIONS = re.compile("hidden_act(ivation)?|activation_function|feed_forward_act")


def read_config(folder: Path, tensors: int, trust_remote_code: bool = False) -> PretrainedConfig:
    """Read the configuration, without what it says about the files of the weights
    (`quantization_config`, `transformers_weights`).

    Args:
        folder: the folder that contains config.json.
        tensors: the number of tensors stored in the folder.
        trust_remote_code: run Python code from the folder if config.json refers to any.

    Raises:
        SourceError: config.json is missing or unreadable, has more layers than there are tensors,
            or transformers does not know the model type.
    """
    check_folder(folder, max(tensors, FEW))
    with reading_config(f"{str(folder)!r}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    use_default_implementations_(config)
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config", "transformers_weights"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def use_default_implementations_(config: PretrainedConfig) -> None:
    """Forget which attention and experts a configuration asks for. It may name a kernel, which
    transformers would download from the hub and run."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if isinstance(part, PretrainedConfig):
            part._attn_implementation_internal = None
            part._experts_implementation_internal = None


def check_folder(folder: Path, most: int = MOST) -> None:
    """Check that config.json has at most `most` layers, and only values that a model can have.

    Raises:
        SourceError: it does not (the message names the key), or it cannot be read.
    """
    with reading_config(f"{str(folder)!r}: config.json cannot be read"):
        # reads the file that AutoConfig reads; config.json can redirect to another one
        settings, _ = PretrainedConfig.get_config_dict(folder)
    entries: list[tuple[str, str, Any]] = [("", "", settings)]  # dotted path, last key, value
    while entries:
        path, key, value = entries.pop()
        if isinstance(value, Mapping):
            entries += [(f"{path}.{name}".lstrip("."), str(name), v) for name, v in value.items()]
        elif isinstance(value, list):
            entries += [(path, key, item) for item in value]
        elif problem := _problem(key, value, most, "auto_map" in settings):
            raise SourceError(
                f"{str(folder / 'config.json')!r}: {path} is {value!r}, {problem}. Correct it, or "
                "download the model again"
            )


def _problem(key: str, value: Any, layers: int, has_own_code: bool) -> str | None:
    """Why no model has this value under `key`; None if one can have it."""
    if isinstance(value, float) and value != value:
        return "which is not a number"
    for pattern, low, limit in _COUNTS if type(value) is int else ():
        high = layers if limit is None else limit
        if not low <= value <= high and re.fullmatch(pattern, key):
            return f"but a model with these files has {max(low, 0)} to {high:,}"
    if not isinstance(value, str):
        return None
    if key in ("dtype", "torch_dtype") and value != "auto":
        kind = getattr(torch, value.removeprefix("torch."), None)
        return None if isinstance(kind, torch.dtype) else "which is no dtype of torch"
    known = {"default", *ROPE_INIT_FUNCTIONS}
    if key == "rope_type" and not has_own_code and value not in known:
        return f"and transformers knows {', '.join(sorted(known))}"
    is_activation = _ACTIVATIONS.fullmatch(key) and not has_own_code
    return "which transformers does not have" if is_activation and value not in ACT2FN else None


@contextmanager
def reading_config(what: str) -> Iterator[None]:
    """Raise any error inside as a SourceError `what: the error`; say what to do if transformers
    refuses to run the model's own code.

    Raises:
        SourceError: anything was raised.
    """
    with foreign_as(SourceError, what):
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise SourceError(
                f"{what}: it needs Python code from its own folder (auto_map in config.json or "
                "tokenizer_config.json), and QWLoRA does not run it by default. Read the code; if "
                "you trust it, set model.trust_remote_code: true in the recipe"
            ) from error
