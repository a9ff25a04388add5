"""What goes into a calibration of activations, and what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

# Calibration data by callback, as AIMET's `compute_encodings` takes it: it gets a model, and calls
# it with each batch.
Callback = Callable[[Callable[..., Sequence[Tensor]]], Any]
# Dicts of arguments, tensors or tuples of tensors, as a DataLoader yields them; see
# `graph/call_arguments.py`. Or a callback.
Batches = Iterable[Any] | Callback


@dataclass(frozen=True)
class CalibrationReport:
    """The data of a calibration, and values that are special.

    Args:
        tokens: attended positions; rows, for inputs without tokens.
        constants: values with the same number everywhere.
        unseen: values that no data reached; they are float now.
        masks: values that turned out to be masks; they are float now.
    """

    tokens: int
    batches: int
    constants: tuple[str, ...]
    unseen: tuple[str, ...]
    masks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def tokens_of(batch: Mapping[str, Any]) -> int:
    """Attended positions of a batch; its rows, if it has neither a mask nor token ids."""
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.ndim == 2:
        return int((mask != 0).sum())
    if isinstance(ids := batch.get("input_ids"), Tensor):
        return ids.numel()
    first: Sequence[Tensor] = [
        value for value in batch.values() if isinstance(value, Tensor) and value.ndim
    ]
    return len(first[0]) if first else 1
