"""Ranks by layer: a budget of parameters goes where one more rank of the start corrects most of what quantization lost.

    maximize  sum_l sum_{k <= r_l} g_l(k)    subject to  sum_l r_l (in_l + out_l) <= budget,  1 <= r_l <= cap
    g_l(k) = sigma_k(K_l^T D_l L_l)^2 / |K_l^T W_l L_l|^2

D, L and K as in `initialize.py` (L = K = 1 for svd), so g_l(k) is what rank k takes from the relative error of layer l, and layers with
large outputs have no louder voice. Gains fall with k: taking the largest gain per parameter until nothing fits is the optimum whenever the budget is spent to
the end, and else misses it by less than one gain. All these ranks are to correct (`initialize_adapter_(..., share=1)`). The result is PEFT's `rank_pattern`,
and an `alpha_pattern` that leaves each layer the scaling that the uniform rank gave it: a plain PEFT adapter. Layers that are not quantized have lost
nothing; they keep the uniform rank, outside the budget.
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
    """How many parameters the adapter of the quantized layers may have.

    Args:
        share: of the parameters that the uniform rank has there.
        cap: the largest rank of a layer.
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
    """The rank of each quantized layer of `model`, whose adapter has a uniform rank; nothing is changed.

    Args:
        weights: the float weight [out, in] that a layer was quantized from, by its canonical path.
        moments: R and G of a layer, likewise; without, both are 1.
        adapter: its name in `model`; the active one unless given.
        solver_scales: as `initialize_adapter_` takes them.

    Raises:
        TrainingError: there is no quantized layer, a moment is missing, a scale is another layer's, or the budget does not give each a rank of one.
    """
    adapter = adapter or model.active_adapter
    layers = dict(quantized_layers(model, adapter))
    if not layers:
        raise TrainingError(
            f"ranks by layer follow what quantization lost, but no layer with adapter {adapter!r} is quantized; give one rank for all"
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
    """g(1) to g(count) of a layer, falling; fewer where the matrix has fewer ranks."""
    measure = Measure(moment)
    singular = measure.best_correction(difference, count).singular.double()
    return sorted((singular.square() / measure.of(weight)).tolist(), reverse=True)


def spread_ranks(
    gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int
) -> dict[str, int]:
    """Ranks of at least one and at most `len(gains[name])`, `costs[name]` parameters each, `budget` in all; equal gains go to the earlier name.

    Raises:
        TrainingError: the budget does not give each name a rank of one.
    """
    ranks, left = dict.fromkeys(gains, 1), budget - sum(costs[name] for name in gains)
    if left < 0:
        raise TrainingError(
            f"a budget of {budget:,} parameters does not give each of {len(gains)} layers a rank of 1, which takes {budget - left:,}; raise it"
        )

    def next_rank(order: int, name: str) -> list[tuple[float, int, str]]:
        return (
            [(-gains[name][ranks[name]] / costs[name], order, name)]
            if ranks[name] < len(gains[name])
            else []
        )

    waiting = [item for order, name in enumerate(gains) for item in next_rank(order, name)]
    heapq.heapify(waiting)
    while waiting:
        _, order, name = heapq.heappop(waiting)
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
            for item in next_rank(order, name):
                heapq.heappush(waiting, item)
    return ranks


def with_ranks(shape: LoraShape, ranks: Mapping[str, int]) -> LoraShape:
    """`shape` with a rank for each layer, and the alpha that keeps its scaling."""

    def alpha(rank: int) -> float:
        times = rank / shape.rank
        return shape.alpha * (math.sqrt(times) if shape.rslora else times)

    return replace(
        shape,
        rank_pattern=dict(ranks),
        alpha_pattern={path: alpha(rank) for path, rank in ranks.items()},
    )
