"""Adapt the arguments of a model call to the inputs of its captured graph.

    attention_mask     given but not captured: dropped if it is all ones
    position_ids       given but not captured: dropped if they are 0, 1, 2, ...
                       captured but not given: 0, 1, 2, ... if nothing is masked
    None               counts as not given

Only arguments that do not change the result are dropped. `Captured.bind` checks the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwlora.errors import CaptureError

_MASK, _POSITIONS = "attention_mask", "position_ids"


def complete_arguments(names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name for a graph with the inputs `names`.

    Raises:
        CaptureError: the graph has no `position_ids` and the given ones do not count from zero; or
            it has them, and a masked batch comes without.
    """
    present = {name: value for name, value in given.items() if value is not None}
    if _MASK in present and _MASK not in names and _is_all_ones(present[_MASK]):
        del present[_MASK]
    if _POSITIONS in present and _POSITIONS not in names:
        if not _counts_from_zero(present.pop(_POSITIONS)):
            raise CaptureError(
                f"{_POSITIONS} do not count from zero, but the graph was captured with "
                f"{', '.join(names)} and counts from the first token, padding included. Add "
                f"{_POSITIONS} to the example inputs of `simulate`"
            )
    elif _POSITIONS in names and isinstance(ids := present.get("input_ids"), Tensor):
        present[_POSITIONS] = _positions(present, ids)
    return present


def _positions(present: Mapping[str, Any], ids: Tensor) -> Tensor:
    positions = present.get(_POSITIONS)
    if isinstance(positions, Tensor):
        is_shared = positions.ndim == 2 and len(positions) == 1  # one row for the whole batch
        return positions.expand(len(ids), -1) if is_shared else positions
    if _MASK in present and not _is_all_ones(present[_MASK]):
        raise CaptureError(
            f"the graph was captured with {_POSITIONS}, and a masked batch needs them; "
            f"give {_POSITIONS}"
        )
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


def _is_all_ones(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask == 1).all())


def _counts_from_zero(positions: Any) -> bool:
    return isinstance(positions, Tensor) and bool(
        (positions == torch.arange(positions.shape[-1], device=positions.device)).all()
    )
