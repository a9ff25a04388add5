"""The inputs of a captured graph, from the arguments of a call: what is left out is filled in where there is one right value, anything else is refused.

attention_mask     left out: every position is attended to;          given, and not captured: must say just that
position_ids       left out: 0, 1, 2 ... if nothing is masked;       given, and not captured: must be just that
anything else      must be given if it was captured, and must not be if it was not
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qwlora.errors import CaptureError

_MASK, _POSITIONS = "attention_mask", "position_ids"


def complete(names: tuple[str, ...], given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Tensors in the order of `names`, the inputs that a graph was captured with; None counts as not given.

    Raises:
        CaptureError: something is given that the graph has no input for, or an input is missing.
    """
    present = {name: value for name, value in given.items() if value is not None}
    main = present.get(names[0])
    if not isinstance(main, Tensor):
        raise CaptureError(f"the simulated graph reads {', '.join(names)}, and {names[0]} is not given")
    for name in present.keys() - set(names):
        if not (isinstance(present[name], Tensor) and _says_nothing(name, present[name])):
            raise CaptureError(
                f"the simulated graph was captured with {', '.join(names)} and has no input {name}; put it among the example inputs of `simulate`"
            )
    return tuple(_expanded(name, present[name], main) if name in present else _filled(name, names, present, main) for name in names)


def _says_nothing(name: str, value: Tensor) -> bool:
    """Whether an input that the graph lacks says what the graph assumes."""
    if name == _MASK:
        return value.ndim == 2 and bool((value == 1).all())
    return name == _POSITIONS and bool((value == torch.arange(value.shape[-1], device=value.device)).all())


def _filled(name: str, names: tuple[str, ...], present: Mapping[str, Tensor], main: Tensor) -> Tensor:
    if name == _MASK:
        return torch.ones(main.shape[:2], dtype=torch.long, device=main.device)
    mask = present.get(_MASK)
    if name == _POSITIONS and (mask is None or bool((mask == 1).all())):
        return torch.arange(main.shape[1], device=main.device).expand(main.shape[:2])
    why = ", which a masked batch needs," if name == _POSITIONS else ""
    raise CaptureError(f"the simulated graph reads {', '.join(names)}, and {name}{why} is not given")


def _expanded(name: str, value: Tensor, main: Tensor) -> Tensor:
    """Positions are often given once for all rows."""
    return value.expand(len(main), -1) if name == _POSITIONS and value.ndim == 2 and len(value) == 1 else value
