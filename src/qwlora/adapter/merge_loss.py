"""Before an adapter is merged: how much of it the base's grid rounds away, and which ties end.

    share = |{ij : |Delta_ij| < step_ij / 2}| / |{ij}|

    Delta     scaling * lora_B lora_A
    step_ij   scale of the base's grid at ij

Base weights are on the grid. After merging and requantizing, an entry of Delta below half a step is
lost, and a larger one is rounded to whole steps. What that costs in perplexity is measured in
`pipeline/commands/merge_adapter.py`.

A tied embedding and head share one weight, but an adapter on either changes only that one: merged,
they need two weights (`untie_`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwlora.adapter.active_adapters import active_adapter
from qwlora.adapter.chunked_loss import causal_model
from qwlora.errors import MergeError
from qwlora.grid.encoding import Encoding, aligned, grouped
from qwlora.nn import PackedLayer
from qwlora.parameter_names import canonical_name


@dataclass(frozen=True)
class RoundingLoss:
    """What rounding loses of one layer's delta.

    Args:
        below: entries below half a step.
        entries: all entries.
        rms_steps: root mean square of the delta, in steps.
    """

    below: int
    entries: int
    rms_steps: float

    @property
    def share(self) -> float:
        return self.below / self.entries


@torch.no_grad()
def rounding_losses(model: nn.Module, adapter: str | None = None) -> dict[str, RoundingLoss]:
    """What requantizing loses of each packed layer's delta, by canonical path."""
    adapter = adapter or active_adapter(model)
    found = {}
    for name, module in model.named_modules():
        if not (isinstance(module, LoraLayer) and _has_adapter(module, adapter)):
            continue
        base = module.get_base_layer()
        if isinstance(base, PackedLayer):
            delta = module.get_delta_weight(adapter).flatten(1).float()
            found[canonical_name(name)] = _of_layer(delta, base.encoding)
    return found


@torch.no_grad()
def untie_(model: nn.Module, adapter: str | None = None) -> list[list[str]]:
    """Give each tied float layer that has the adapter a weight of its own, in place.

    The model's configuration then says that nothing is tied.

    Returns:
        For each cloned weight, the canonical paths of the layers that shared it.

    Raises:
        MergeError: the model class ties such a layer regardless of its configuration.
    """
    adapter = adapter or active_adapter(model)
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(canonical_name(name))
    untied = {}
    for module in model.modules():
        if not (isinstance(module, LoraLayer) and _has_adapter(module, adapter)):
            continue
        layer = module.get_base_layer()
        weight = layer._parameters.get("weight")
        if weight is not None and len(sharing.get(id(weight), ())) > 1:
            layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            untied[id(weight)] = sharing[id(weight)]
    if untied:
        _forget_ties_(causal_model(model), {name for names in untied.values() for name in names})
    return list(untied.values())


def _forget_ties_(model: PreTrainedModel, layers: set[str]) -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    if tied := sorted(
        layers & {name.removesuffix(".weight") for pair in ties.items() for name in pair}
    ):
        raise MergeError(
            f"{tied[0]}: {type(model).__name__} always ties this layer, so an adapter on it cannot "
            "be merged; keep the adapter separate"
        )


def _has_adapter(module: LoraLayer, adapter: str) -> bool:
    return adapter in (*module.lora_A, *module.lora_embedding_A)


def _of_layer(delta: Tensor, encoding: Encoding) -> RoundingLoss:
    granularity = encoding.scheme.granularity
    steps = grouped(delta, granularity) / aligned(encoding.scale, granularity, delta.ndim)
    return RoundingLoss(
        int((steps.abs() < 0.5).sum()), steps.numel(), float(steps.square().mean().sqrt())
    )
