"""One name for a tensor, whatever wraps its module.

PEFT wraps a model (`base_model.model.`) and its layers (`.base_layer`), and adds the adapter's name
after `lora_A` and `modules_to_save`. Encodings, fingerprints and exported files use names without
these parts:

    base_model.model.model.layers.0.up_proj.base_layer.weight
                     model.layers.0.up_proj.weight
    base_model.model.model.layers.0.up_proj.lora_A.topics.weight
                     model.layers.0.up_proj.lora_A.weight

"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"  # of a job; of an adapter and its folder
BASE = "base"  # what the base is called where an adapter or a use case has its name
# The last one is torch.compile's.
_WRAPPERS = ("base_layer", "original_module", "_orig_mod")


def canonical_name(path: str) -> str:
    """Name of a module or tensor without PEFT's and torch.compile's wrappers."""
    parts = path.split(".")
    while parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    kept: list[str] = []
    after_adapter = False
    for i, part in enumerate(parts):
        if after_adapter:
            after_adapter = False
            continue
        # PEFT may nest several LoRA wrappers around one module, one for each of its parameters.
        # The factors of an inner one keep the `base_layer`s, so that names stay distinct.
        inner = next((p for p in parts[i:] if p not in _WRAPPERS), "")
        if part not in _WRAPPERS or inner.startswith("lora_"):
            kept.append(part)
        after_adapter = _holds_adapters(part)
    return ".".join(kept)


def is_adapter_name(path: str) -> bool:
    """Whether the module or tensor at this path belongs to an adapter, not to the base."""
    return any(_holds_adapters(part) for part in path.split("."))


def adapter_of(path: str) -> str | None:
    """Name of the adapter that the tensor at this path belongs to; None for the base.

    base_model.model.model.layers.0.mlp.up_proj.lora_A.topics.weight  -> topics
    """
    names = (name for holder, name in pairwise(path.split(".")) if _holds_adapters(holder))
    return next(names, None)


def is_factor_name(path: str) -> bool:
    """Whether this canonical path is that of an adapter's factor: lora_A, lora_B."""
    *_, owner, key = ["", *path.split(".")]
    return key in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B") or (
        owner in ("lora_A", "lora_B") and key == "weight"
    )


def is_first_factor(path: str) -> bool:
    """Whether a factor's canonical path is that of lora_A: [rank, in]; lora_B is [out, rank]."""
    return is_factor_name(path) and path.removesuffix(".weight").endswith("_A")


FOLDER = "packed_parameters"  # the submodule that holds a module's packed 3-D parameters


def parameter_name(path: str) -> str:
    """Name of the float tensor that the packed layer at module path `path` replaces.

    model.layers.0.mlp.up_proj                               -> model.layers.0.mlp.up_proj.weight
    model.layers.0.mlp.experts.packed_parameters.down_proj   -> model.layers.0.mlp.experts.down_proj
    """
    name = canonical_name(path)
    owner, folder, last = f".{name}".rpartition(f".{FOLDER}.")
    return f"{owner}.{last}".strip(".") if folder else f"{name}.weight"


def by_glob(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by a glob over the number of their layer: `model.layers.*.mlp.up_proj`."""
    globs: dict[str, list[str]] = {}
    for name in names:
        globs.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return globs


def pattern_problem(pattern: str, is_end: bool = False) -> str | None:
    """Why `pattern` is not a regular expression, as PEFT needs; None if it is one. With `is_end`,
    PEFT matches the end of a path with it, not the whole path."""
    # PEFT puts keys of rank_pattern into this expression, and uses target_modules as they are.
    try:
        re.compile(rf"(.*\.)?({pattern})$" if is_end else pattern)
    except re.error as error:
        problem = f"{pattern!r} is not a regular expression, which PEFT takes here: {error.msg}"
        if "*" not in pattern:
            return problem
        glob = ".*".join(map(re.escape, pattern.split("*")))
        return f"{problem}; what is meant as a glob is written {glob}"
    return None


def _holds_adapters(part: str) -> bool:
    return part.startswith("lora_") or part == "modules_to_save"
