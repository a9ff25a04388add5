"""A batch, in whatever form a DataLoader gives it, as the keyword arguments of a model.

{"input_ids": ids, "labels": labels}    the same, without labels where the model or graph takes none
ids                                     the first argument
(ids, mask), [ids, mask]                the first arguments, in order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.errors import CaptureError, QwloraError

LABELS = "labels"
_MASK = "attention_mask"


def as_arguments(batch: Any, names: Sequence[str]) -> dict[str, Any]:
    """`batch` by argument name.

    Args:
        names: what the model or graph takes, in order.

    Raises:
        CaptureError: the batch has none of the forms above or more tensors than there are names,
            or it has another tensor (usually labels) where the attention mask would be.
    """
    if isinstance(batch, Mapping):
        return {name: value for name, value in batch.items() if name != LABELS or name in names}
    tensors = [batch] if isinstance(batch, Tensor) else batch
    if not isinstance(tensors, tuple | list) or not all(isinstance(t, Tensor) for t in tensors):
        raise CaptureError(
            f"A batch is a {type(batch).__name__}. Give a dict of arguments, a tensor, or a tuple "
            "of tensors"
        )
    if len(tensors) > len(names):
        raise CaptureError(
            f"A batch has {len(tensors)} tensors, but there are {len(names)} inputs "
            f"({', '.join(names)}). Give a dict of arguments"
        )
    arguments = dict(zip(names, tensors, strict=False))
    mask = arguments.get(_MASK)
    if mask is not None and mask.ndim == 2 and bool(((mask != 0) & (mask != 1)).any()):
        raise CaptureError(
            f"Tensor {list(arguments).index(_MASK)} of a batch would be {_MASK}, but has values "
            "other than 0 and 1. Give a dict of arguments"
        )
    return arguments


def check_token_ids(
    arguments: Mapping[str, Any], model: nn.Module, error: type[QwloraError]
) -> None:
    """Refuse token ids that `model` has no embedding of; arguments without `input_ids` pass.

    Raises:
        QwloraError: of type `error`: they are no integers [batch, tokens], there are none, or one
            is outside the vocabulary.
    """
    ids = arguments.get("input_ids")
    if not isinstance(ids, Tensor):
        return
    if ids.dtype not in (torch.int64, torch.int32) or ids.ndim != 2 or not ids.numel():
        raise error(
            f"input_ids are {ids.dtype} of shape {list(ids.shape)}, but token ids are torch.int64 "
            "of shape [batch, tokens], with at least one token"
        )
    vocabulary = vocabulary_size(model)
    lowest, highest = (int(end) for end in ids.aminmax())
    if vocabulary and not 0 <= lowest <= highest < vocabulary:
        raise error(
            f"token ids range from {lowest} to {highest}, but the model's vocabulary has "
            f"{vocabulary} entries. Use the tokenizer of this model"
        )


def vocabulary_size(model: nn.Module) -> int:
    """Number of rows of the input embedding; 0 if the model has none."""
    get: Any = getattr(model, "get_input_embeddings", None)
    try:
        embeddings = get() if get is not None else None
    except (AttributeError, NotImplementedError):  # a model that reads no tokens
        return 0
    return int(
        getattr(embeddings, "num_embeddings", None)
        or getattr(getattr(model, "config", None), "vocab_size", None)
        or 0
    )
