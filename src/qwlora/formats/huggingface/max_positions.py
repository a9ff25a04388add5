"""The longest sequence that a model has positions for, by its configuration.

    max_position_embeddings, no rope_parameters    a table with one row per position (GPT-2, OPT,
                                                   BERT, GPT-J's sines): longer ones are impossible
    with rope_parameters                           rotary, computed for any position: longer ones
                                                   run, but the model was not trained on them

The limit of rotary positions is

    max(max_position_embeddings, factor * original_max_position_embeddings)

because `max_position_embeddings` is the scaled length in some configurations (Llama 3.1) and the
unscaled one in others (Qwen2.5 with YaRN).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from qwlora.errors import SourceError

_UNSCALED = ("default", "axial", "proportional")  # rope types without a scaling factor


def check_positions(model: PreTrainedModel, count: int) -> str | None:
    """Check that sequences of `count` tokens have positions.

    Returns:
        A warning if `count` exceeds the length that the model was trained on, else None. Also None
        if rotary positions are scaled to a length that the configuration does not state.

    Raises:
        SourceError: the model has a table of positions with fewer than `count` rows.
    """
    config: Any = model.config.get_text_config()
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    rows = stated
    rope = getattr(config, "rope_parameters", None) or {}
    # either one dictionary for each type of layer, or a single one
    for part in [part for part in rope.values() if isinstance(part, dict)] or [rope]:
        kind, factor = part.get("rope_type", "default"), part.get("factor")
        original = part.get("original_max_position_embeddings") or stated
        if kind == "dynamic" or (factor is None and kind not in _UNSCALED and original >= stated):
            return None
        rows = max(rows, int((factor or 1) * original))
    if count <= rows:
        return None
    sentence = (
        f"sequences have {count} tokens, but {type(model).__name__} has positions for {rows} "
        f"(max_position_embeddings{'' if rows == stated else f' {stated}, scaled'})"
    )
    if not rope:
        raise SourceError(f"{sentence}: set data.sequence_tokens to {rows} or less")
    return (
        f"{sentence}. It was not trained on longer sequences; expect worse results, or lower "
        "data.sequence_tokens"
    )
