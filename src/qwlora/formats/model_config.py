"""Reading a model's config.json after checking that its counts are plausible.

While transformers reads a configuration, it expands some numbers: `num_hidden_layers` into a list
of layer types, `num_labels` into label names. A config.json of 1 KB can therefore fill the memory
before any model is built. Here these counts are first compared with the number of stored tensors,
because every layer has at least one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qwlora.errors import SourceError
from qwlora.formats.remote_code import refuse_remote_code

LAYERS = re.compile(r".*(layers|blocks|depths?|_dense_replace)|n_layer|num_layer|attention_types")
LABELS = re.compile("num_labels")
MOST_LABELS = 300_000  # one tensor holds all labels, so the number of tensors does not limit them
FEW = 128  # lowest limit: valid configurations of small models contain such numbers too
MOST = 10_000  # layers, if the number of tensors is not known


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
    """Check that config.json has at most `most` layers.

    Raises:
        SourceError: it has more (the message names the key), or it cannot be read.
    """
    try:
        # reads the file that AutoConfig reads; config.json can redirect to another one
        settings, _ = PretrainedConfig.get_config_dict(folder)
    except Exception as error:
        raise _unreadable(folder, error) from error
    check_counts(settings, most, repr(str(folder / "config.json")))


def check_counts(settings: Mapping[str, Any], most: int, where: str) -> None:
    """Check that no layer count in `settings`, nested ones included
    (`text_config.num_hidden_layers`), exceeds `most`.

    Raises:
        SourceError: a count is larger; the message names its key.
    """
    limits = {LAYERS: most, LABELS: MOST_LABELS}
    rest: list[tuple[str, int | None, Any]] = [("", None, settings)]
    while rest:
        key, limit, value = rest.pop()
        if isinstance(value, Mapping):
            for name, inner in value.items():
                matching = (n for keys, n in limits.items() if keys.fullmatch(str(name)))
                rest.append((f"{key}.{name}".lstrip("."), next(matching, None), inner))
        elif isinstance(value, list):
            rest += [(key, limit, inner) for inner in value]
        elif limit is not None and isinstance(value, int) and value > limit:
            raise SourceError(
                f"{where}: {key} is {value}, but a model with these files has at most {limit}. "
                "config.json is damaged or belongs to another model; download the model again"
            )


def _unreadable(folder: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{str(folder)!r}: config.json cannot be read: {error or type(error).__name__}"
    )
