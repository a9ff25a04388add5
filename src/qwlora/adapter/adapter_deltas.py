"""The deltas of an adapter: their size, the loss from merging them, and merging itself.

    delta     dW = scaling * lora_B lora_A        [out, in], rank r
    gain      |dW| / |W|                          Frobenius norms, W the frozen weight
    share     |{ij : |dW_ij| < step_ij / 2}| / |{ij}|,    step_ij the scale of the base's grid at ij

DoRA's magnitudes are not included.

An adapter is merged in one of two ways:

    float         W_hat + dW as a float model: computes the same as base and adapter, but is as
                  large as the float model
    requantized   W_hat + dW rounded onto the base's grid: as small as the base, but entries of the
                  delta below half a step are lost, and larger ones are rounded to whole steps

`W_hat` are the dequantized weights of the base, never the original float weights. For mergeable
adapters (`mergeable.py`), both ways are exact.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from accelerate.hooks import add_hook_to_module
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.adapter.adapter_files import check_settings
from qwlora.adapter.attach import active_adapter, active_adapters
from qwlora.adapter.chunked_loss import causal_model
from qwlora.adapter.mergeable import is_mergeable, lora_layers, merge_into_codes_
from qwlora.errors import MergeError, foreign_as
from qwlora.grid.encoding import aligned, grouped
from qwlora.nn import PackedLayer, weight_out_in
from qwlora.nn.packed_layer import (
    PackedParameter,
    accelerate_hook,
    forget_ties_,
    replacement_problem,
    with_tensor,
)
from qwlora.system.parameter_names import canonical_name

Into = Literal["float", "requantized"]
KEPT = 0.9  # share of the adapter's improvement that a merge must keep to be called harmless


@torch.no_grad()
def adapter_updates(model: nn.Module) -> dict[str, dict[str, float]]:
    """`gain`, to six digits, of the active adapter's linear layers, by canonical path."""
    adapter = active_adapter(model)
    updates = {}
    for path, layer in lora_layers(model, adapter):
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            continue
        a, b = (f[adapter].weight.cpu().double() for f in (layer.lora_A, layer.lora_B))
        # |B A|^2 = tr((B^T B) (A A^T)) needs only products of size [r, r]. Rounding can make the
        # sum slightly negative, so it is clamped.
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
    check_settings({adapter: cast("PeftModel", model).peft_config[adapter]})
    losses = {}
    for path, layer in lora_layers(model, adapter):
        base = layer.get_base_layer()
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


def merge_effect(
    layers: Mapping[str, dict[str, float]], base: float, adapted: float, merged: float
) -> dict[str, Any]:
    """Effect of merging an adapter into the base's integers, for `qwlora merge --json`.

    `share`: of the delta's entries, how many are below half a step. `kept`: share of the
    improvement in perplexity; may be negative, and is None if there was none.

    Args:
        layers: rounding loss by canonical layer path; empty for a mergeable adapter.
        base, adapted, merged: perplexities of the base, with the adapter, and requantized.
    """
    gained = base - adapted
    kept = (base - merged) / gained if gained > 0 else None
    is_harmless = kept is not None and kept >= KEPT
    if kept is None:
        advice = "There is nothing to merge."
    elif is_harmless:
        advice = "Merge, or keep the adapter separate to swap adapters."
    else:
        advice = (
            f"Keep the adapter separate, or use --into float: less than {KEPT:.0%} of its "
            "improvement is left in the integers."
        )
    below, entries = (sum(loss[key] for loss in layers.values()) for key in ("below", "entries"))
    return {
        "share": below / max(1, entries),
        "base": base,
        "adapted": adapted,
        "merged": merged,
        "kept": kept,
        "is_harmless": is_harmless,
        "recommendation": advice,
        "layers": layers,
    }


@torch.no_grad()
def untie_(model: nn.Module) -> list[list[str]]:
    """Give each tied layer that has the adapter a weight of its own, in place. Returns the paths of
    the layers that shared each cloned weight."""
    sharing: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := _shared_weight(module)) is not None:
            sharing.setdefault(weight, []).append(name)
    untied = {}
    for _, adapted in lora_layers(model, active_adapter(model)):
        weight = _shared_weight(adapted.get_base_layer())
        if weight is None or len(names := sharing.pop(weight, [])) < 2:
            continue
        untied[weight] = [canonical_name(name) for name in names]
        for name in names:
            layer: Any = model.get_submodule(name)
            if isinstance(layer, PackedLayer):
                model.set_submodule(name, with_tensor(layer, copy.deepcopy(layer.tensor)))
            else:
                layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    if untied:
        inner = causal_model(model)
        # Otherwise transformers would tie the layers again when it loads the merged model. Some
        # models tie layers whatever their configuration says.
        forget_ties_(inner)
        pairs = inner.all_tied_weights_keys.items()
        tied = {name.removesuffix(".weight") for pair in pairs for name in pair}
        if still := sorted(tied & {name for names in untied.values() for name in names}):
            raise MergeError(
                f"{still[0]}: {type(inner).__name__} always ties its weight to another layer's, so "
                "an adapter on it cannot be merged; keep the adapter separate"
            )
    return list(untied.values())


def _shared_weight(module: nn.Module) -> int | None:
    if isinstance(module, PackedLayer):
        # `tensor` is made at each access, so only the address of the codes tells ties.
        return module.tensor.parts.packed.data_ptr()
    weight = module._parameters.get("weight")
    return None if weight is None else id(weight)


def merged_model(adapted: PeftModel, into: Into = "requantized") -> PreTrainedModel:
    """Merge the active adapter. Destroys `adapted`.

    Args:
        into: `float` for `W_hat + dW`, or `requantized` for the same rounded onto the base's grid.

    Returns:
        The model without PEFT's wrappers.

    Raises:
        SourceError: a setting of the adapter is not supported.
        MergeError: the adapter has non-finite values or is on fused experts; the model's code ties
            an adapted layer; or `into` is float and the model has fused experts.
    """
    names = active_adapters(adapted)
    check_settings({name: adapted.peft_config[name] for name in names})
    is_exact = is_mergeable(adapted, names)
    # An ordinary adapter is added to floats. A mergeable one was trained on rounded codes, so they
    # are written first and unpacked afterwards.
    if into == "float" and not is_exact:
        unpack_(adapted)
    # A tied embedding and head share a weight, but an adapter on one changes only that one.
    untie_(adapted)
    merge_into_codes_(adapted, names)  # no-op if nothing is packed
    with foreign_as(MergeError, "PEFT cannot merge this adapter"):
        merged: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    if into == "float" and is_exact:
        unpack_(merged)
    restore_conv1d_(merged)
    return merged.eval()


class UnpackedConv1D(nn.Linear):
    """A float layer that replaces a packed Conv1D, with the weight as [out, in]."""


def unpack_(model: nn.Module) -> None:
    """Replace packed layers of `model` with layers of their float classes, in place; ties stay."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)
    }
    for name, layer in layers.items():
        if isinstance(layer, PackedParameter):
            raise MergeError(
                f"{canonical_name(name)}: fused experts cannot be unpacked to floats, so nothing "
                "can be merged into this model. Keep the adapter separate."
            )
        if problem := replacement_problem(layer):
            raise MergeError(f"{canonical_name(name)} {problem}")
    parameters: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        key = layer.tensor.parts.packed.data_ptr()
        if key not in parameters:
            values = layer.tensor.dequantize(layer.compute_dtype).view(layer.weight_shape)
            parameters[key] = nn.Parameter(values, requires_grad=False)
        # PEFT wraps a packed Conv1D as a Linear, so its float weight is [out, in] until the
        # adapter is gone (`restore_conv1d_`).
        conv1d = UnpackedConv1D if layer.was_conv1d else None
        module = layer.to_layer(parameters[key], conv1d)
        if hook := accelerate_hook(layer):
            add_hook_to_module(module, hook)
        model.set_submodule(name, module)


def restore_conv1d_(model: nn.Module) -> None:
    """Replace each `UnpackedConv1D` by a Conv1D. Call it after the adapters are removed."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, UnpackedConv1D):
            # Built empty, because Conv1D draws random numbers for its initial weight.
            conv1d = Conv1D(0, 0).train(linear.training)
            conv1d.nf, conv1d.nx = linear.weight.shape
            weight = linear.weight.detach().T.contiguous()
            conv1d.weight = nn.Parameter(weight, requires_grad=False)
            conv1d.bias = linear.bias
            model.set_submodule(name, conv1d)
