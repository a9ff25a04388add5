"""What a GGUF file says of rotary positions and transformers does not take from it.

    ARCH.rope.scaling.type, .factor, ...      how positions are stretched (linear, yarn, longrope); ARCH.rope.scale_linear in old files
    rope_freqs.weight, rope_factors_*.weight  factors of the rotary frequencies

llama.cpp computes with them. A model that transformers builds of the file has plain rotary positions unless its loading code for the architecture reads the
scaling (gpt-oss), so long texts come out otherwise than in llama.cpp. A warning says so; a Hugging Face folder has all of it in its config.json.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from qwlora.formats.gguf.gguf_file import GgufFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FACTORS = re.compile(r"(.*\.)?rope_(freqs|factors_long|factors_short)\.weight")


def warn_of_positions(file: GgufFile, config: PretrainedConfig) -> None:
    """Warn of what is in `file` about positions and not in `config`, which transformers made of it."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    unread = [name for name in file.tensors if FACTORS.fullmatch(name)]
    if not _scaled(parameters):
        unread = [f"{key} = {value}" for key, value in _scaling(file).items()] + unread
    if unread:
        warnings.warn(
            f"{str(file.path)!r} scales its rotary positions ({', '.join(unread[:6])}), as llama.cpp computes; transformers does not read that from a GGUF "
            f"file and computes plain ones (rope_parameters {parameters or None}), so its results differ, most on long texts. Give the model's Hugging Face "
            "folder as the source, whose config.json says it; or, in Python, set config.rope_parameters of open_checkpoint(...) before load_precomputed",
            stacklevel=3,
        )


def _scaling(file: GgufFile) -> dict[str, Any]:
    """The metadata of a scaling, if it changes positions."""
    prefix = f"{file.architecture}.rope."
    found = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith((f"{prefix}scaling.", f"{prefix}scale_linear"))
    }
    kind = found.get(f"{prefix}scaling.type", "linear")  # llama.cpp's own default
    factor = found.get(f"{prefix}scaling.factor", found.get(f"{prefix}scale_linear", 0))
    return {} if kind == "none" or (kind == "linear" and factor in (0, 1)) else found


def _scaled(parameters: dict[str, Any]) -> bool:
    """Whether a configuration's positions are scaled, in any of its kinds of layers."""
    parts = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    return any(part.get("rope_type", "default") != "default" for part in parts)
