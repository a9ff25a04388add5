"""How many positions a model has.

learned     a table with a row a position: an embedding beside the token embedding (GPT-2, OPT, BERT), or a buffer of sines (GPT-J, CTRL); none beyond it
rotary      computed for any position; max_position_embeddings says up to which the model was trained
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from qwlora.errors import SourceError

_OFFSETS = 8  # rows that a table may have beyond the configuration's count: OPT and BART have 2


def check_positions(model: PreTrainedModel, count: int) -> str | None:
    """See that sequences of `count` tokens have positions; returns what should be said of them if they go beyond what the model was trained for.

    Raises:
        SourceError: the model has a table of positions, and it is shorter.
    """
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    name, rows = _table(model, stated) or (None, stated)
    if count <= rows:
        return None
    found = f"sequences have {count} tokens, but {type(model).__name__} has positions for {rows}"
    if name is not None:
        raise SourceError(f"{found} (the table {name}): set data.sequence_tokens to {rows} at most")
    return f"{found} (max_position_embeddings) and computes the others without having been trained on them; expect worse results, or lower data.sequence_tokens"


def _table(model: PreTrainedModel, stated: int) -> tuple[str, int] | None:
    """The name of the model's table of positions, and how many positions it has."""
    tokens = model.get_input_embeddings()
    for path, module in model.named_modules():
        beside = dict(module.named_children())
        if not any(child is tokens for child in beside.values()):
            continue
        for key, table in beside.items():
            if isinstance(table, nn.Embedding) and table is not tokens and 0 <= table.num_embeddings - stated <= _OFFSETS:
                unused = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa counts from the row behind its padding
                return f"{path}.{key}".removeprefix("."), min(stated, table.num_embeddings - unused)
    return next(((name, stated) for name, buffer in model.named_buffers() if buffer.ndim == 2 and len(buffer) == stated), None)
