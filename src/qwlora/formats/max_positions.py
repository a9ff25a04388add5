"""The longest sequence that a model has positions for.

    table     one row per position: an embedding next to the token embedding (GPT-2, OPT, BERT) or a
    buffer
              of sines (GPT-J, CTRL). Longer sequences are impossible.
    rotary    computed for any position. Longer sequences run, but the model was not trained on
    them.

The limit of rotary positions is

    max(max_position_embeddings, factor * original_max_position_embeddings)

because `max_position_embeddings` is the scaled length in some configurations (Llama 3.1) and the
unscaled one in others (Qwen2.5 with YaRN).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qwlora.errors import SourceError

_OFFSETS = 8  # a table may have a few more rows than the configuration says: OPT and BART have 2
_NAME = re.compile(r"(?:^|_)(?:wpe|pos(?!t))")  # wpe, pos_emb, embed_positions
_CLASS = re.compile(r"Pos(?:ition|Emb|Enc)")
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
        stated = None
    table = _table(model, stated)
    rows = table[1] if table else _reach(config, stated) if stated else None
    if rows is None or count <= rows:
        return None
    found = f"sequences have {count} tokens, but {type(model).__name__} has positions for {rows}"
    if table:
        raise SourceError(
            f"{found} (the table {table[0]}): set data.sequence_tokens to {rows} or less"
        )
    origin = (
        "max_position_embeddings" if rows == stated else f"max_position_embeddings {stated}, scaled"
    )
    return (
        f"{found} ({origin}). It was not trained on longer sequences; expect worse results, or "
        "lower data.sequence_tokens"
    )


def _reach(config: Any, stated: int) -> int | None:
    """The length that rotary positions were trained on or scaled to; None if that is unknown."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # either one dictionary for each type of layer, or a single one
    by_layers = [p for p in parameters.values() if isinstance(p, dict)] or [parameters]
    reaches = [stated]
    for rope in by_layers:
        kind, factor = rope.get("rope_type", "default"), rope.get("factor")
        original = rope.get("original_max_position_embeddings") or stated
        if kind == "dynamic" or (factor is None and kind not in _UNSCALED and original >= stated):
            return None
        reaches.append(int((factor or 1) * original))
    return max(reaches)


def _table(model: PreTrainedModel, stated: int | None) -> tuple[str, int] | None:
    """The name of the model's table of positions and its number of positions, or None."""
    if found := min(_position_embeddings(model, stated), key=lambda entry: entry[0], default=None):
        return found[1:]
    return next(
        (
            (name, len(buffer))
            for name, buffer in model.named_buffers()
            if buffer.ndim == 2 and len(buffer) == stated
        ),
        None,
    )


def _position_embeddings(
    model: PreTrainedModel, stated: int | None
) -> Iterator[tuple[tuple[bool, bool], str, int]]:
    """Embeddings next to the token embedding that are named like positions or have the stated size.

    Yields a sort key (smallest for the most certain), the name, and the number of positions.
    """
    tokens = model.get_input_embeddings()
    for path, module in model.named_modules():
        siblings = dict(module.named_children())
        if not any(child is tokens for child in siblings.values()):
            continue
        for key, table in siblings.items():
            if not isinstance(table, nn.Embedding) or table is tokens:
                continue
            named = bool(_NAME.search(key) or _CLASS.search(type(table).__name__))
            fits = stated is not None and 0 <= table.num_embeddings - stated <= _OFFSETS
            # RoBERTa's first position is the row after its padding index
            unused = 0 if table.padding_idx is None else table.padding_idx + 1
            rows = table.num_embeddings - max(unused, int(getattr(table, "offset", 0)))
            if named or fits:
                yield (
                    (not fits, not named),
                    f"{path}.{key}".removeprefix("."),
                    min(stated, rows) if fits and stated else rows,
                )
