"""Arguments of a call on a simulated model, made such that the graph takes them or refuses them for a reason.

    attention_mask     given, and not captured: dropped if every position is attended to
    position_ids       given, and not captured: dropped if it says 0, 1, 2 ...;   captured, and not given: 0, 1, 2 ... if nothing is masked
    None               counts as not given

What the graph assumes anyhow may be said; nothing that would change the result is dropped. The rest is `Captured.bind`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwlora.errors import CaptureError

_MASK, _POSITIONS = "attention_mask", "position_ids"


def complete(names: tuple[str, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, for a graph that was captured with the inputs `names`.

    Raises:
        CaptureError: positions that the graph lacks are not those it assumes, or those that it needs are not given with a mask.
    """
    present = {name: value for name, value in given.items() if value is not None}
    if _MASK in present and _MASK not in names and _is_all_ones(present[_MASK]):
        del present[_MASK]
    if _POSITIONS in present and _POSITIONS not in names:
        if not _counts_from_zero(present.pop(_POSITIONS)):
            raise CaptureError(
                f"{_POSITIONS}: the graph was captured with {', '.join(names)} and counts positions from the first token, padding or not; "
                f"put {_POSITIONS} among the example inputs of `simulate`"
            )
    elif _POSITIONS in names and isinstance(ids := present.get("input_ids"), Tensor):
        present[_POSITIONS] = _positions(present, ids)
    return present


def _positions(present: Mapping[str, Any], ids: Tensor) -> Tensor:
    positions = present.get(_POSITIONS)
    if isinstance(positions, Tensor):
        return (
            positions.expand(len(ids), -1)
            if positions.ndim == 2 and len(positions) == 1
            else positions
        )  # often given once for all rows
    if _MASK in present and not _is_all_ones(present[_MASK]):
        raise CaptureError(
            f"{_POSITIONS}: the graph was captured with them, and a masked batch needs them; give them"
        )
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)


def _is_all_ones(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask == 1).all())


def _counts_from_zero(positions: Any) -> bool:
    return isinstance(positions, Tensor) and bool(
        (positions == torch.arange(positions.shape[-1], device=positions.device)).all()
    )
