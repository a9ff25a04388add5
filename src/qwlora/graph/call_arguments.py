"""A batch, in whatever form a DataLoader gives it, as the keyword arguments of a model.

{"input_ids": ids, "labels": labels}    the same, without labels where the model or graph takes none
ids                                     the first argument
(ids, mask), [ids, mask]                the first arguments, in order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qwlora.errors import CaptureError

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
