"""One name for a tensor, whatever wraps its module.

PEFT wraps a model (`base_model.model.`) and its layers (`.base_layer`), and puts the adapter's name behind `lora_A` and `modules_to_save`. Encodings,
fingerprints and exported files use the name without all that:

    base_model.model.model.layers.0.mlp.up_proj.base_layer.weight     -> model.layers.0.mlp.up_proj.weight
    base_model.model.model.layers.0.mlp.up_proj.lora_A.topics.weight  -> model.layers.0.mlp.up_proj.lora_A.weight

Of several adapters that PEFT wraps around one module, for several parameters of it, an inner one keeps the `base_layer`s that it is in.
"""

from __future__ import annotations

import re
from itertools import pairwise

_WRAPPERS = ("base_layer", "original_module", "_orig_mod")  # the last is torch.compile's


def canonical_name(path: str) -> str:
    """Name of a module or tensor with the adapter library's wrappers taken out."""
    parts = path.split(".")
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    kept: list[str] = []
    behind_adapter = False
    for i, part in enumerate(parts):
        if behind_adapter:
            behind_adapter = False
            continue
        if part not in _WRAPPERS or next(
            (p for p in parts[i:] if p not in _WRAPPERS), ""
        ).startswith("lora_"):
            kept.append(part)
        behind_adapter = _holds_adapters(part)
    return ".".join(kept)


def is_adapter_name(path: str) -> bool:
    """Whether a module or tensor of this path belongs to an adapter, not to the base."""
    return any(_holds_adapters(part) for part in path.split("."))


def adapter_of(path: str) -> str | None:
    """Name of the adapter that a tensor of this path belongs to: the part directly behind `lora_A` and the like, or `modules_to_save`; None of the base's.

    base_model.model.model.layers.0.mlp.up_proj.lora_A.topics.weight  -> topics
    """
    return next(
        (name for holder, name in pairwise(path.split(".")) if _holds_adapters(holder)), None
    )


def is_factor_name(path: str) -> bool:
    """Whether a tensor of this canonical path is one of the two factors of an adapter's product."""
    *_, owner, key = ["", *path.split(".")]
    return key in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") or (
        owner in ("lora_A", "lora_B") and key == "weight"
    )


FOLDER = "packed_parameters"  # a module's packed 3-D parameters lie in a submodule of this name


def parameter_name(path: str) -> str:
    """Name of the float tensor that a packed layer at module path `path` stands for.

    model.layers.0.mlp.up_proj                               -> model.layers.0.mlp.up_proj.weight
    model.layers.0.mlp.experts.packed_parameters.down_proj   -> model.layers.0.mlp.experts.down_proj
    """
    name = canonical_name(path)
    owner, folder, last = name.rpartition(f".{FOLDER}.")
    return f"{owner}.{last}" if folder else f"{name}.weight"


def pattern_problem(pattern: str, is_end: bool = False) -> str | None:
    """Why PEFT could not match module paths with `pattern`, with the way out if it is meant as a glob; None if it is a regular expression.

    Args:
        is_end: whether it is for the end of a path, as the keys of rank_pattern are, and not for a whole one, as target_modules is.
    """
    try:
        re.compile(rf"(.*\.)?({pattern})$" if is_end else pattern)
    except re.error as error:
        remedy = (
            f"; what is meant as a glob is written {'.*'.join(map(re.escape, pattern.split('*')))}"
            if "*" in pattern
            else ""
        )
        return f"{pattern!r} is no regular expression, which PEFT takes here: {error.msg}{remedy}"
    return None


def _holds_adapters(part: str) -> bool:
    return part.startswith("lora_") or part == "modules_to_save"
