"""Whether float weights already lie on a uniform grid of few levels: then quantizing them rounds
them a second time, and the grid that they have is the better one.

A run of weights w lies on a grid with at most 2^b levels if, for some whole number K < 2^b,

    (w - min w) * K / (max w - min w)    are whole numbers

K is the number of steps that the run spans. All K are tried, on evenly spaced runs of 32
consecutive weights of a row: short enough to lie within one block, whatever the granularity. With d
different values and a tolerance t for the float type's rounding, random weights pass with
probability

    2^b (2 t)^(d - 2)

and only runs where that is below 1 % count. Cost: a sample, so it does not grow with the tensor.

Not found: grids whose scale changes from one input to the next, and grids in a type whose rounding
is as large as a step (8 bits in bfloat16).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from qwlora.errors import QwloraWarning, listed

_RUN = 32
_RUNS = 64
_FIRST = 8  # tested before the others: none of them is on a grid in nearly every float tensor
_CHANCE = 0.01


def is_on_grid(weight: Tensor, bitwidth: int) -> bool:
    """Whether most runs of `weight` [..., in] that can tell lie on a uniform grid of at most
    2^bitwidth levels."""
    if weight.is_meta or bitwidth > 8 or not weight.numel():
        return False
    rows = weight.detach().reshape(-1, weight.shape[-1])
    length = min(_RUN, rows.shape[1])
    per_row = rows.shape[1] // length
    count = min(_RUNS, len(rows) * per_row)
    which = torch.linspace(0, len(rows) * per_row - 1, count, device=weight.device).long()
    columns = (which % per_row * length).unsqueeze(1) + torch.arange(length, device=weight.device)
    runs = rows[(which // per_row).unsqueeze(1), columns]
    first = runs[:: max(1, len(runs) // _FIRST)]
    return bool(_fit(first, bitwidth).any()) and bool(_fit(runs, bitwidth).mean() > 0.5)


def _fit(runs: Tensor, bitwidth: int) -> Tensor:
    """For each run of three values or more: 1 if it lies on a grid, 0 if not."""
    w = runs.double().sort(1).values
    different = 1 + (w.diff(dim=1) > 0).sum(1)
    w, different = w[different > 2], different[different > 2]
    low, high = w[:, :1], w[:, -1:]
    steps = torch.arange(1, 2**bitwidth, device=w.device, dtype=w.dtype).view(-1, 1, 1)
    position = steps * ((w - low) / (high - low))
    off = (position - position.round()).abs().amax(2)
    largest = torch.maximum(low.abs(), high.abs()) / (high - low)
    tolerance = 2 * torch.finfo(runs.dtype).eps * (steps * largest).squeeze(2)
    chance = 2**bitwidth * (2 * tolerance) ** (different - 2)
    return ((off <= tolerance) & (chance < _CHANCE)).any(0).float()


def warn_of_second_rounding(errors: Mapping[str, float | None]) -> None:
    """Warn about layers that were rounded a second time, given the relative error of each."""
    rounded = {name: error for name, error in errors.items() if error}
    if not rounded:
        return
    worst = sorted(rounded.items(), key=lambda item: -item[1])
    shown = listed(f"{name} by {error:.1%}" for name, error in worst)
    warnings.warn(
        f"the weights of {len(rounded)} layers already were on a grid with as few levels, and were "
        f"rounded a second time, to another grid: {shown}. To keep the grid they had, set "
        "base.solver: keep in a recipe (and model.encodings, unless the model is a GGUF file), or "
        "give its encodings to qwlora.freeze_",
        QwloraWarning,
        stacklevel=3,
    )
