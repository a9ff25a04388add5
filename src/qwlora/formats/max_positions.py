"""How many positions a model has.

learned     a table with a row a position: an embedding beside the token embedding (GPT-2, OPT, BERT), or a buffer of sines (GPT-J, CTRL); none beyond it
rotary      computed for any position; the configuration says up to which the model was trained

    reach of rotary positions = max(max_position_embeddings, factor * original_max_position_embeddings)

since some configurations state the scaled count (Llama 3.1) and some the count before scaling (Qwen2.5 with YaRN).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qwlora.errors import SourceError

_OFFSETS = 8  # rows that a table may have beyond the configuration's count: OPT and BART have 2
_NAME = re.compile(r"(?:^|_)(?:wpe|pos(?!t))")  # wpe, pos_emb, embed_positions
_CLASS = re.compile(r"Pos(?:ition|Emb|Enc)")
_UNSCALED = ("default", "axial", "proportional")  # without a factor


def check_positions(model: PreTrainedModel, count: int) -> str | None:
    """See that sequences of `count` tokens have positions; returns what should be said of them if they go beyond what the model was trained for.

    Nothing is said where rotary positions are scaled and the configuration does not say how far.

    Raises:
        SourceError: the model has a table of positions, and it is shorter.
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
            f"{found} (the table {table[0]}): set data.sequence_tokens to {rows} at most"
        )
    origin = (
        "max_position_embeddings" if rows == stated else f"max_position_embeddings {stated}, scaled"
    )
    return f"{found} ({origin}) and computes the others without having been trained on them; expect worse results, or lower data.sequence_tokens"


def _reach(config: Any, stated: int) -> int | None:
    """Up to which position rotary embeddings were trained or scaled; None where they are scaled and that is not known."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layers = [p for p in parameters.values() if isinstance(p, dict)] or [
        parameters
    ]  # one for each type of layer, or one
    reaches = [stated]
    for rope in by_layers:
        kind, factor = rope.get("rope_type", "default"), rope.get("factor")
        original = rope.get("original_max_position_embeddings") or stated
        if kind == "dynamic" or (factor is None and kind not in _UNSCALED and original >= stated):
            return None
        reaches.append(int((factor or 1) * original))
    return max(reaches)


def _table(model: PreTrainedModel, stated: int | None) -> tuple[str, int] | None:
    """The name of the model's table of positions, and how many positions it has."""
    if found := min(_beside_tokens(model, stated), key=lambda entry: entry[0], default=None):
        return found[1:]
    return next(
        (
            (name, len(buffer))
            for name, buffer in model.named_buffers()
            if buffer.ndim == 2 and len(buffer) == stated
        ),
        None,
    )


def _beside_tokens(
    model: PreTrainedModel, stated: int | None
) -> Iterator[tuple[tuple[bool, bool], str, int]]:
    """The embeddings beside that of the tokens which are named after positions, or have as many rows; the surest have the smallest key."""
    tokens = model.get_input_embeddings()
    for path, module in model.named_modules():
        beside = dict(module.named_children())
        if not any(child is tokens for child in beside.values()):
            continue
        for key, table in beside.items():
            if not isinstance(table, nn.Embedding) or table is tokens:
                continue
            named = bool(_NAME.search(key) or _CLASS.search(type(table).__name__))
            fits = stated is not None and 0 <= table.num_embeddings - stated <= _OFFSETS
            unused = (
                0 if table.padding_idx is None else table.padding_idx + 1
            )  # RoBERTa counts from the row behind its padding
            rows = table.num_embeddings - max(unused, int(getattr(table, "offset", 0)))
            if named or fits:
                yield (
                    (not fits, not named),
                    f"{path}.{key}".removeprefix("."),
                    min(stated, rows) if fits and stated else rows,
                )
