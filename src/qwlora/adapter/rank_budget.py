"""Ranks by layer: spend a parameter budget where one more rank corrects most quantization error.

    maximize    sum_l sum_{k <= r_l} g_l(k)
    subject to  sum_l r_l (in_l + out_l) <= budget,    1 <= r_l <= cap
    g_l(k) = sigma_k(K_l^T D_l L_l)^2 / |K_l^T W_l L_l|^2

D, L and K as in `initialize.py` (L = K = 1 for svd). g_l(k) is the reduction of layer l's relative
error by its rank k, so layers with large outputs do not dominate. Gains decrease with k. Taking the
largest gain per parameter until nothing fits is optimal if the budget is spent exactly, and
otherwise within one gain of the optimum.

All these ranks are for correction (`initialize_adapter_(..., share=1)`). The result is a plain PEFT
adapter: a `rank_pattern`, and an `alpha_pattern` that keeps the scaling of the uniform rank. Layers
that are not quantized have no error to correct; they keep the uniform rank, outside the budget.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from peft import PeftModel
from torch import Tensor

from qwlora.adapter.attach import LoraShape
from qwlora.adapter.initialize import (
    Measure,
    check_moments,
    check_scales,
    quantized_layers,
    solver_difference,
)
from qwlora.errors import TrainingError
from qwlora.grid.second_moments import Moment
from qwlora.progress import Track, untracked


@dataclass(frozen=True)
class RankBudget:
    """Number of parameters that the adapter may have on quantized layers.

    Args:
        share: of the parameters that the uniform rank has on these layers.
        cap: largest rank of a layer.
    """

    share: float
    cap: int


def rank_by_layer(
    model: PeftModel,
    budget: RankBudget,
    weights: Callable[[str], Tensor],
    moments: Mapping[str, Moment] | None = None,
    adapter: str | None = None,
    track: Track = untracked,
    solver_scales: Mapping[str, Tensor] | None = None,
) -> dict[str, int]:
    """The rank of each quantized layer of `model`, by canonical path. Does not change the model.

    Args:
        model: with an adapter of uniform rank.
        weights: canonical path to the float weight [out, in] that the layer was quantized from.
        moments: canonical path to R and G of the layer; None: both are 1.
        adapter: name of the adapter; default: the active one.
        solver_scales: see `initialize_adapter_`.

    Raises:
        TrainingError: there is no quantized layer, a moment is missing, a scale belongs to another
            layer, or the budget does not suffice for rank 1 everywhere.
    """
    adapter = adapter or model.active_adapter
    layers = dict(quantized_layers(model, adapter))
    if not layers:
        raise TrainingError(
            "ranks by layer follow the quantization error, but no layer with adapter "
            f"{adapter!r} is quantized; give one rank for all"
        )
    if moments is not None:
        check_moments(layers, moments)
    check_scales(model, solver_scales or {})
    costs = {path: int(sum(layer.get_base_layer().weight.shape)) for path, layer in layers.items()}
    parameters = int(
        budget.share * sum(costs[path] * layer.r[adapter] for path, layer in layers.items())
    )
    gains = {}
    for path in track(list(layers), "choosing ranks", len(layers)):
        weight = weights(path).detach().float()
        difference = solver_difference(path, layers[path], weight, solver_scales or {})
        gains[path] = rank_gains(
            weight, difference, budget.cap, None if moments is None else moments[path]
        )
    return spread_ranks(gains, costs, parameters)


def rank_gains(
    weight: Tensor, difference: Tensor, count: int, moment: Moment | None = None
) -> list[float]:
    """g(1) to g(count) of a layer, in decreasing order; fewer if the matrix has fewer ranks."""
    measure = Measure(moment)
    singular = measure.best_correction(difference, count).singular.double()
    return sorted((singular.square() / measure.of(weight)).tolist(), reverse=True)


def spread_ranks(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks from 1 to `len(gains[name])` that fit into `budget` parameters.

    Args:
        gains: gain of each rank of a layer, in decreasing order. Ties go to the earlier name.
        costs: parameters per rank of a layer.
        budget: parameters in total.


    Raises:
        TrainingError: the budget does not suffice for rank 1 everywhere.
    """
    ranks = dict.fromkeys(gains, 1)
    remaining = budget - sum(costs[name] for name in gains)
    if remaining < 0:
        raise TrainingError(
            f"a budget of {budget:,} parameters does not give each of {len(gains)} layers a rank "
            f"of 1, which takes {budget - remaining:,}; raise it"
        )

    def next_rank(order: int, name: str) -> list[tuple[float, int, str]]:
        if ranks[name] >= len(gains[name]):
            return []
        return [(-gains[name][ranks[name]] / costs[name], order, name)]

    queue = [item for order, name in enumerate(gains) for item in next_rank(order, name)]
    heapq.heapify(queue)
    while queue:
        _, order, name = heapq.heappop(queue)
        if costs[name] <= remaining:
            ranks[name] += 1
            remaining -= costs[name]
            for item in next_rank(order, name):
                heapq.heappush(queue, item)
    return ranks


def with_ranks(shape: LoraShape, ranks: Mapping[str, int]) -> LoraShape:
    """`shape` with the given rank for each layer, and the alpha that keeps its scaling."""

    def alpha(rank: int) -> float:
        times = rank / shape.rank
        return shape.alpha * (math.sqrt(times) if shape.rslora else times)

    return replace(
        shape,
        rank_pattern=dict(ranks),
        alpha_pattern={path: alpha(rank) for path, rank in ranks.items()},
    )
