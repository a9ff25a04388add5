"""A model's configuration, read only after its counts are seen to be possible.

transformers expands some numbers while it reads a configuration (`num_hidden_layers` into a list of layer types, `num_labels` into names), so that one of
1 KB can fill memory before there is a model. What a file says it counts is compared with the tensors that are there: a layer has at least one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from qwlora.errors import SourceError
from qwlora.formats.model_source import refuse_code

LAYERS = re.compile(r".*(layers|blocks|depths?|_dense_replace)|n_layer|num_layer|attention_types")
LABELS = re.compile("num_labels")
MOST_LABELS = 300_000  # a classifier has one tensor for all of them
FEW = 128  # honest files of few tensors say as much of what they do not have (max_window_layers)
MOST = 10_000  # layers, where it is not known how many tensors there are


def read_config(folder: Path, tensors: int, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration without what it says about quantization.

    Args:
        folder: of config.json.
        tensors: how many the folder's files hold.
        trust_remote_code: run Python code from the folder, if config.json names some.

    Raises:
        SourceError: there is none, it counts more layers than there are tensors, or transformers does not know the model.
    """
    check_folder(folder, max(tensors, FEW))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a file's values reach any line of any configuration's code
        refuse_code(repr(str(folder)), error)
        raise _unreadable(folder, error) from error
    for part in (config, config.get_text_config()):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    return config


def check_folder(folder: Path, most: int = MOST) -> None:
    """Refuse a config.json that counts more than `most` layers.

    Raises:
        SourceError: it does (the key is named), or cannot be read.
    """
    try:
        settings, _ = PretrainedConfig.get_config_dict(
            folder
        )  # of the file that AutoConfig takes, which config.json may name
    except Exception as error:
        raise _unreadable(folder, error) from error
    check_counts(settings, most, repr(str(folder / "config.json")))


def check_counts(settings: Mapping[str, Any], most: int, where: str) -> None:
    """Refuse settings that count more than `most` layers, here or in a part (`text_config.num_hidden_layers`).

    Raises:
        SourceError: they do; the key is named.
    """
    limits = {LAYERS: most, LABELS: MOST_LABELS}
    rest: list[tuple[str, int | None, Any]] = [("", None, settings)]
    while rest:
        key, limit, value = rest.pop()
        if isinstance(value, Mapping):
            for name, part in value.items():
                rest.append(
                    (
                        f"{key}.{name}".lstrip("."),
                        next(
                            (n for counts, n in limits.items() if counts.fullmatch(str(name))), None
                        ),
                        part,
                    )
                )
        elif isinstance(value, list):
            rest += [(key, limit, part) for part in value]
        elif limit is not None and isinstance(value, int) and value > limit:
            raise SourceError(
                f"{where}: {key} is {value}, but a model of these files has at most {limit}; it is damaged, or belongs to another model"
            )


def _unreadable(folder: Path, error: Exception) -> SourceError:
    return SourceError(
        f"{str(folder)!r}: config.json cannot be read: {error or type(error).__name__}"
    )
