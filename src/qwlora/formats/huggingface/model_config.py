"""Reading a model's config.json after checking the values that transformers would choke on.

While transformers reads a configuration, it expands some numbers: `num_hidden_layers` into a list
of layer types, `num_labels` into label names. A config.json of 1 KB can therefore fill the memory
before any model is built. So counts are first compared with the number of stored tensors, because
every layer has at least one. Other values that no model has get an error that names their key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qwlora.errors import SourceError
from qwlora.messages import listed, near_names

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
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # bad values can fail anywhere in a configuration class
        refuse_remote_code(repr(str(folder)), error)
        raise _unreadable(folder, error) from error
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
    try:
        # reads the file that AutoConfig reads; config.json can redirect to another one
        settings, _ = PretrainedConfig.get_config_dict(folder)
    except Exception as error:
        raise _unreadable(folder, error) from error
    for path, key, value in _entries(settings):
        if problem := _problem(key, value, most, "auto_map" in settings):
            raise SourceError(
                f"{str(folder / 'config.json')!r}: {path} is {value!r}, {problem}. Correct it, or "
                "download the model again"
            )


def _problem(key: str, value: Any, layers: int, has_own_code: bool) -> str | None:
    """Why no model has this value under `key`; None if one can have it."""
    if isinstance(value, float) and value != value:
        return "which is not a number"
    for pattern, low, high in _COUNTS:
        high = layers if high is None else high
        if type(value) is int and not low <= value <= high and re.fullmatch(pattern, key):
            return f"but a model with these files has {max(low, 0)} to {high:,}"
    if key in ("dtype", "torch_dtype") and isinstance(value, str) and value != "auto":
        import torch

        if not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
            return "which is no dtype of torch, such as bfloat16"
    if _ACTIVATIONS.fullmatch(key) and isinstance(value, str) and not has_own_code:
        from transformers.activations import ACT2FN

        if value not in ACT2FN:
            near = listed(near_names(value, ACT2FN))
            return f"which transformers does not have (similar: {near})"
    return None


def _entries(settings: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(dotted path, key, value) of every value in nested settings; items of a list have its key."""
    rest: list[tuple[str, str, Any]] = [("", "", settings)]
    while rest:
        path, key, value = rest.pop()
        if isinstance(value, Mapping):
            rest += [(f"{path}.{name}".lstrip("."), str(name), v) for name, v in value.items()]
        elif isinstance(value, list):
            rest += [(path, key, item) for item in value]
        else:
            yield path, key, value


def _unreadable(folder: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{str(folder)!r}: config.json cannot be read: {error or type(error).__name__}"
    )


def refuse_remote_code(what: str, error: Exception) -> None:
    """Raise a SourceError if `error` is the refusal of transformers to run the model's own code.

    Does nothing for any other error; the caller then handles it.

    Args:
        what: the model, for the message.
        error: what transformers raised.
    """
    if "trust_remote_code" in str(error):
        raise SourceError(
            f"{what} needs Python code from its own folder (auto_map in config.json or "
            "tokenizer_config.json), and QWLoRA does not run it by default. Read the code; if you "
            "trust it, set model.trust_remote_code: true in the recipe"
        ) from error
