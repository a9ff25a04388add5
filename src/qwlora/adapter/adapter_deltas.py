"""How large the deltas of an adapter are, next to the frozen weights: what training changed, what
merging would lose, and which ties it would end.

    delta     dW = scaling * lora_B lora_A        [out, in], rank r
    gain      |dW| / |W|                          Frobenius norms, W the frozen weight
    share     |{ij : |dW_ij| < step_ij / 2}| / |{ij}|,    step_ij the scale of the base's grid at ij

|dW|^2 = scaling^2 tr((B^T B) (A A^T)) needs only products of size [r, r]. DoRA's magnitudes are not
included.

Base weights are on the grid. After merging and requantizing, an entry of the delta below half a
step is lost, and a larger one is rounded to whole steps. What that costs in perplexity is measured
in `pipeline/commands/write_model.py`.

A tied embedding and head share one weight, but an adapter on either changes only that one: merged,
they need two weights (`untie_`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.attach import active_adapter
from qwlora.adapter.chunked_loss import causal_model
from qwlora.errors import MergeError
from qwlora.grid.encoding import aligned, grouped
from qwlora.nn import PackedLayer, weight_out_in
from qwlora.system.parameter_names import canonical_name


def _adapted_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any, Any]]:
    """(canonical path, PEFT's layer, base layer) of every layer that has the adapter."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter in (*module.lora_A, *module.lora_embedding_A):
            yield canonical_name(name), module, module.get_base_layer()


@torch.no_grad()
def adapter_updates(model: nn.Module) -> dict[str, dict[str, float]]:
    """`gain`, to six digits, of the active adapter's linear layers, by canonical path."""
    adapter = active_adapter(model)
    updates = {}
    for path, layer, base in _adapted_layers(model, adapter):
        if not isinstance(base, nn.Linear | Conv1D):
            continue
        a, b = (f[adapter].weight.double().cpu() for f in (layer.lora_A, layer.lora_B))
        squares = ((b.T @ b) * (a @ a.T)).sum()
        size = layer.scaling[adapter] * float(squares.clamp_min(0).sqrt())
        frozen = float(weight_out_in(base).norm())
        updates[path] = {"gain": float(f"{size / frozen:.6g}")} if frozen else {}
    return updates


@torch.no_grad()
def rounding_losses(model: nn.Module) -> dict[str, dict[str, float]]:
    """What requantizing loses of each packed layer's delta, by canonical path: the number of
    `entries` and of those `below` half a step, their `share`, and `rms_steps`, the root mean square
    of the delta in steps."""
    adapter = active_adapter(model)
    losses = {}
    for path, layer, base in _adapted_layers(model, adapter):
        if isinstance(base, PackedLayer):
            delta = layer.get_delta_weight(adapter).flatten(1).float()
            granularity = base.encoding.scheme.granularity
            scale = aligned(base.encoding.scale, granularity, delta.ndim)
            steps = grouped(delta, granularity) / scale
            below = int((steps.abs() < 0.5).sum())
            losses[path] = {
                "below": below,
                "entries": steps.numel(),
                "rms_steps": float(steps.square().mean().sqrt()),
                "share": below / steps.numel(),
            }
    return losses


@torch.no_grad()
def untie_(model: nn.Module) -> list[list[str]]:
    """Give each tied float layer that has the adapter a weight of its own, in place.

    The model's configuration then says that nothing is tied.

    Returns:
        For each cloned weight, the canonical paths of the layers that shared it.
    """
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            sharing.setdefault(id(weight), []).append(canonical_name(name))
    untied = {}
    for _, _, base in _adapted_layers(model, active_adapter(model)):
        weight = base._parameters.get("weight")
        if weight is not None and len(sharing.get(id(weight), ())) > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            untied[id(weight)] = sharing[id(weight)]
    if untied:
        inner = causal_model(model)
        for config in (inner.config, inner.config.get_text_config()):
            config.tie_word_embeddings = False
        inner.all_tied_weights_keys = inner.get_expanded_tied_weights_keys(all_submodels=True)
        pairs = inner.all_tied_weights_keys.items()
        tied = {name.removesuffix(".weight") for pair in pairs for name in pair}
        if still := sorted(tied & {name for names in untied.values() for name in names}):
            raise MergeError(
                f"{still[0]}: {type(inner).__name__} always ties this layer, so an adapter on it "
                "cannot be merged; keep the adapter separate"
            )
    return list(untied.values())
