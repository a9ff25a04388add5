"""Warns about rotary position scaling in a GGUF file that transformers ignores.

    ARCH.rope.scaling.type, .factor, ...      position scaling (linear, yarn, longrope);
                                              ARCH.rope.scale_linear in old files
    rope_freqs.weight, rope_factors_*.weight  factors of the rotary frequencies

llama.cpp applies them. The model that transformers builds from the file has unscaled rotary
positions, unless its loading code for the architecture reads the scaling (gpt-oss does). Results
then differ from llama.cpp, mostly on long texts. A Hugging Face folder states the scaling in
config.json.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from qwlora.errors import QwloraWarning, listed
from qwlora.formats.gguf.gguf_file import GgufFile

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FACTORS = re.compile(r"(.*\.)?rope_(freqs|factors_long|factors_short)\.weight")


def warn_of_positions(file: GgufFile, config: PretrainedConfig) -> None:
    """Warn if `file` scales positions and `config`, which transformers read from it, does not."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    unread = [name for name in file.tensors if FACTORS.fullmatch(name)]
    by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
    if all(part.get("rope_type", "default") == "default" for part in (parameters, *by_layer_type)):
        unread = [f"{key} = {value}" for key, value in _scaling(file).items()] + unread
    if unread:
        warnings.warn(
            f"{str(file.path)!r} scales rotary positions ({listed(unread)}). llama.cpp "
            "applies this, but transformers does not read it from a GGUF "
            f"file (rope_parameters {parameters or None}), so results differ, mostly on long "
            "texts. Give the model's Hugging Face folder as the source, "
            "or, in Python, set config.rope_parameters of open_checkpoint(...) before "
            "load_precomputed",
            QwloraWarning,
            stacklevel=3,
        )


def _scaling(file: GgufFile) -> dict[str, Any]:
    """The metadata of position scaling; empty if it does not change positions."""
    prefix = f"{file.architecture}.rope.scal"  # scaling.type, scaling.factor ..., scale_linear
    scaling = {key: value for key, value in file.metadata.items() if key.startswith(prefix)}
    kind = scaling.get(f"{prefix}ing.type", "linear")  # llama.cpp's own default
    factor = scaling.get(f"{prefix}ing.factor", scaling.get(f"{prefix}e_linear", 0))
    return {} if kind == "none" or (kind == "linear" and factor in (0, 1)) else scaling
