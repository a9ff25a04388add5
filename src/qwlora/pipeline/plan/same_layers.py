"""Whether an adapter from elsewhere changes only layers that a new adapter of the job changes too,
as far as files and recipe say it. Reads neither the model nor weights, and imports no torch.

A new adapter covers a linear layer by its target_modules, as PEFT reads them:

    all-linear    every layer inside a numbered block (the output layer is in none)
    names         layers whose path ends with one of them

Of a regular expression it is not known: it may take for ever.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from qwlora.recipe import Adapter, Recipe

_FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_IN_BLOCK = re.compile(r".+\.\d+\..+")


def is_covered(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether new adapters of `recipe` change all layers of an adapter that continues a folder.

    False if that is not known: the adapter is on the hub, or its files cannot be read or hold
    something else than factors of linear layers.
    """
    layers = _linear_layers(Path(str(adapter.continue_from)))
    return bool(layers) and any(
        other.continue_from is None
        and other.layers is None
        and all(_targets(other.target_modules, layer) for layer in layers)
        for other in recipe.adapters
    )


def _targets(target_modules: str | list[str], layer: str) -> bool:
    if isinstance(target_modules, list):
        return any(layer == name or layer.endswith(f".{name}") for name in target_modules)
    if target_modules.lower() == "all-linear":
        return _IN_BLOCK.fullmatch(layer) is not None
    return False


def _linear_layers(folder: Path) -> set[str]:
    """Paths of the layers of a PEFT adapter; empty if it is unreadable or has something else."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        with safe_open(folder / "adapter_model.safetensors", "np") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
    except (OSError, ValueError, RecursionError, SafetensorError):
        return set()
    if not isinstance(config, dict) or config.get("target_parameters"):
        return set()
    found = {name: _FACTOR.fullmatch(name) for name in shapes}
    if any(found[name] is None or len(shape) != 2 for name, shape in shapes.items()):
        return set()
    return {match[1] for match in found.values() if match is not None}
