"""Whether new adapters change all layers of an adapter from elsewhere. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from safetensors import SafetensorError, safe_open

from qwlora.errors import SourceError
from qwlora.formats.model_source import source_path

_WEIGHTS = "adapter_model.safetensors", "adapters.safetensors"  # of PEFT, or else of mlx-lm
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(?:[AB]\.weight|[ab])")
_IN_BLOCK = re.compile(r".+\.\d+\..+")


def is_covered(source: str, new: Iterable[str | list[str]]) -> bool:
    """Whether the `target_modules` of one new adapter match all layers of the adapter in a folder.

    Returns:
        False also if it is on the hub, cannot be read, or holds more than factors of linear layers.
    """
    try:
        folder = source_path(source)
        config = json.loads((folder / "adapter_config.json").read_text())
        weights, *_ = (folder / name for name in _WEIGHTS if (folder / name).is_file())
        with safe_open(weights, "np") as file:
            sizes = {n: len(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
        # Factors of convolutions have more than two axes; an embedding's have other names.
        factors = [size == 2 and _FACTOR.fullmatch(name) for name, size in sizes.items()]
        layers = {match[1] for match in factors if match}
        if not layers or not all(factors) or config.get("target_parameters"):
            return False
    except (SourceError, OSError, ValueError, AttributeError, RecursionError, SafetensorError):
        return False

    # As PEFT matches: names are the ends of paths, and `all-linear` is every linear layer inside a
    # numbered block. A regular expression is never tried: it could take forever.
    def matches(modules: str | list[str], layer: str) -> bool:
        if isinstance(modules, list):
            return any(f".{layer}".endswith(f".{name}") for name in modules)
        return modules.lower() == "all-linear" and _IN_BLOCK.fullmatch(layer) is not None

    return any(all(matches(modules, layer) for layer in layers) for modules in new)
