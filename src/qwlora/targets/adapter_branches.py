"""The branch of an adapter in a graph, beside the product of a linear layer M.

    y = x W^T  becomes  y = x W^T + (x A) B

    M.lora_A [in, r], M.lora_B [r, out]    inputs; transposed, and the scale is in lora_B
    zero adapter                           both of rank 0, or zeros where a runtime needs a rank

Targets genai, web, openvino and executorch have it, each in its own graph library.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from qwlora.errors import ExportError, listed

Shapes = dict[str, tuple[int | None, int | None]]  # of inputs; None: the rank
Arrays = dict[str, np.ndarray[Any, Any]]


def factor_shapes(module: str, columns: int, rows: int) -> Shapes:
    """The inputs of the branch at a layer [rows, columns]."""
    return {f"{module}.lora_A": (columns, None), f"{module}.lora_B": (None, rows)}


def zero_adapter(shapes: Shapes, rank: int = 0) -> Arrays:
    """The value of every input that leaves the base as it is."""
    return {
        n: np.zeros([rank if s is None else s for s in sizes], "f4") for n, sizes in shapes.items()
    }


def adapter_inputs(
    factors: Mapping[str, tuple[Tensor, Tensor]], none: Mapping[str, np.ndarray[Any, Any]]
) -> Arrays:
    """The value of every input.

    Args:
        factors: A [r, in] and B [out, r] of each module, scaled.
        none: the zero adapter, for the modules that are not in `factors`.
    """
    if missing := [module for module in factors if f"{module}.lora_A" not in none]:
        raise ExportError(
            f"the exported base has no place for the adapter's {listed(missing)}: they are no "
            "linear layers of the captured graph. Train the adapter without them"
        )
    return {**none} | {
        f"{module}.lora_{half}": factor.t().contiguous().float().numpy()
        for module, pair in factors.items()
        for half, factor in zip("AB", pair, strict=True)
    }
