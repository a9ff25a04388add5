"""Adapters that merge without loss: training computes the integers that merging writes.

    q' = clamp(q + round(r + Delta / s), 0, 2^bitwidth - 1),    Delta = scaling * lora_B lora_A
    y  = what the base layer computes with the codes q' in place of its codes q

The grid is the base's own: scales and offsets stay, whatever they are (`PackedTensor.plus`). An
untrained adapter (lora_B = 0) computes the base, bit for bit.

r is the base's rounding error in steps, (W_float - W_hat) / s, at one of 16 levels from -8/16 to
7/16. With r, a small Delta can flip weights that are close to a rounding boundary. Without the
float model r is 0, and only entries of Delta above half a step count (docs/log/training.md).
Merging needs the same float weights; the adapter records their digest.

Gradients are straight-through: dL/dx is computed with q', and lora_A and lora_B get the gradients
of an ordinary adapter, `dL/dDelta = (dL/dy)^T x`.

    mergeable_(peft_model, weight=...)    before training
    merged_model(peft_model)              afterwards (`adapter_deltas.py`), or PEFT's
                                          merge_and_unload()

It supports one adapter at a time, and no DoRA, dropout, biases, fused experts, grouped convolutions
or float base layers. PEFT without this package computes y = W x + Delta x, which differs from
training.

Relies, beyond PEFT's documented interfaces (0.21.2), on `LoraVariant` and attributes of its layers.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterator
from typing import Any, NoReturn

import torch
from accelerate.hooks import add_hook_to_module
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, LoraVariant, ParamWrapper
from torch import Tensor, nn

from qwlora.errors import MergeError, TrainingError, listed
from qwlora.nn.fingerprint import update_digest
from qwlora.nn.packed_layer import (
    PackedLayer,
    accelerate_hook,
    is_packed,
    replacement_problem,
    with_tensor,
)
from qwlora.system.parameter_names import FOLDER, adapter_of, canonical_name


class MergedIntegers(LoraVariant):
    """How PEFT's layers compute an adapter that merges without loss; `remainder` is r."""

    def __init__(self, remainder: Tensor | None = None):
        self.remainder = remainder

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        used = [name for name in module.active_adapters if name in module.lora_variant]
        if len(used) > 1:
            raise TrainingError(
                f"adapters {', '.join(used)} are mergeable, so each changes the base's integers. "
                "Activate only one"
            )
        # PEFT has cast x to the adapter's dtype. A merged model computes in that of the base.
        x = x.to(result.dtype) if x.is_floating_point() else x
        return merged_forward(module, active_adapter, x)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        module.base_layer = _merged_layer(module, active_adapter)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> NoReturn:
        raise MergeError(
            "the merged model no longer has the base's integers. Load the base and the adapter "
            "again"
        )


def lora_layers(model: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers, by canonical path. With `adapter`, only layers that have it."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (adapter is None or adapter in module.r):
            yield canonical_name(path), module


def mergeable_(
    model: nn.Module, adapter: str | None = None, weight: Callable[[str], Tensor] | None = None
) -> None:
    """Make an adapter of `model` compute the integers that merging it writes. In place; call it
    before training.

    Args:
        model: a `PeftModel` on a quantized base.
        adapter: name of the adapter. Default: all adapters.
        weight: function from a layer's path to its float weight [out, in] before quantization, as
            for `initialize_`. Default: no float weights, which costs much of the gain.

    Raises:
        TrainingError: a layer is not supported (see the module), its forward was replaced, or there
            is no such adapter. The model is unchanged.
    """
    layers = [
        (path, layer, name)
        for path, layer in lora_layers(model)
        for name in ([*layer.r] if adapter is None else {adapter} & layer.r.keys())
    ]
    if not layers:
        raise TrainingError(
            f"{type(model).__name__} has no adapter{f' {adapter!r}' if adapter else ''} to make "
            "mergeable. Attach one first (peft.get_peft_model)"
        )
    # All checks come first, so that an error leaves the model unchanged.
    for path, layer, name in layers:
        if problem := _problem(layer, name):
            raise TrainingError(f"adapter {name!r} cannot be mergeable: {path} {problem}")
    tensors = [(path, layer.get_base_layer().tensor) for path, layer, _ in layers]
    remainders = [t.remainder(weight(path)) if weight else None for path, t in tensors]
    for (_, layer, name), remainder in zip(layers, remainders, strict=True):
        # PEFT calls a variant in place of its own sum, so no forward has to be replaced.
        layer.lora_variant[name] = MergedIntegers(remainder)


def remainders_digest(model: nn.Module, adapter: str) -> str | None:
    """SHA-256 of what quantization left of the layers of a mergeable adapter; None if unknown."""
    remainders = {
        path: variant.remainder
        for path, layer in lora_layers(model)
        if isinstance(variant := layer.lora_variant.get(adapter), MergedIntegers)
    }
    digest, known = hashlib.sha256(), {p: r for p, r in remainders.items() if r is not None}
    update_digest(digest, (part for item in sorted(known.items()) for part in item))
    return digest.hexdigest() if known else None


def _problem(layer: LoraLayer, adapter: str) -> str | None:
    """Why this layer's adapter cannot be merged into integers; None if it can."""
    if isinstance(layer, ParamWrapper):
        return "holds fused experts. Name linear layers in target_modules, and no experts"
    if not isinstance(layer.lora_variant.get(adapter), MergedIntegers | None):
        return "has DoRA or another variant of LoRA. Attach a plain adapter"
    if isinstance(layer.lora_dropout[adapter], nn.Dropout):
        return "has dropout, and there is no branch to drop. Set it to 0"
    if layer.lora_bias.get(adapter):
        return "has a bias in lora_B. Set lora_bias to False"
    base = layer.get_base_layer()
    if not is_packed(base):
        return "is float in the base. Quantize it by a rule, or leave it out of target_modules"
    if getattr(base, "groups", 1) > 1:
        return "is a convolution in groups. Leave it out of target_modules"
    return replacement_problem(base)


def is_mergeable(model: nn.Module, adapters: Collection[str] | None = None) -> bool:
    """Whether one of these adapters is mergeable. Default: any adapter of `model`."""
    return any(
        isinstance(variant, MergedIntegers) and (adapters is None or name in adapters)
        for _, layer in lora_layers(model)
        for name, variant in layer.lora_variant.items()
    )


def merged_forward(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """The output of `layer` with its adapter merged; see the module."""
    y: Tensor = _merged_layer(layer, adapter)(x)
    # Clamped entries get a gradient too: leaving them out needs dL/dDelta [out, in], a third
    # product as large as the layer's own.
    if torch.is_grad_enabled():
        y = _StraightThrough.apply(y, _branch(layer, adapter, x.detach()))
    return y


@torch.no_grad()
def _merged_layer(layer: Any, adapter: str) -> PackedLayer:
    base, variant = layer.get_base_layer(), layer.lora_variant.get(adapter)
    remainder = variant.remainder if variant else None
    return with_tensor(base, base.tensor.plus(*_factors(layer, adapter), remainder))


@torch.no_grad()
def merge_into_codes_(model: nn.Module, adapters: Collection[str]) -> None:
    """Merge these adapters into the codes of packed layers, in place: each PEFT layer around one
    becomes a packed layer."""
    merging: dict[str, tuple[Any, list[str]]] = {}
    for path, layer in model.named_modules():
        names = [name for name in adapters if isinstance(layer, LoraLayer) and name in layer.r]
        if not names:
            continue
        base, where = layer.get_base_layer(), canonical_name(path)
        if FOLDER in base._modules:
            raise MergeError(
                f"{where}: an adapter on fused experts cannot be merged. Keep the adapter separate"
            )
        if not is_packed(base):
            continue
        if problem := replacement_problem(base):
            raise MergeError(f"{where} {problem}")
        if len(names) > 1 and is_mergeable(layer, names):
            raise MergeError(f"{where}: {listed(names)} are mergeable: activate one at a time")
        for name, factor in layer.named_parameters():
            if adapter_of(name) in names and not bool(torch.isfinite(factor).all()):
                raise MergeError(f"{where}.{name} has non-finite values. Train the adapter again")
        merging[path] = layer, names
    for path, (layer, names) in merging.items():
        base, name = layer.get_base_layer(), names[0]
        is_plain = isinstance(layer.lora_variant.get(name), MergedIntegers | None)
        has_more = layer.lora_bias.get(name) or getattr(base, "groups", 1) > 1
        # PEFT alone knows how DoRA, biases, groups and several adapters change a weight.
        if len(names) == 1 and is_plain and not has_more:
            merged = _merged_layer(layer, name)
        else:
            merged = _merged_by_peft(layer, names)
        if hook := accelerate_hook(base):
            add_hook_to_module(merged, hook)
        model.set_submodule(path, merged)


def _merged_by_peft(layer: Any, adapters: list[str]) -> PackedLayer:
    """The base layer with the codes nearest to PEFT's own merge, in float64."""
    base = layer.get_base_layer()
    weight = base.tensor.dequantize().double()
    parameter = nn.Parameter(weight.view(base.weight_shape), requires_grad=False)
    wide = copy.deepcopy(base.to_layer(parameter, nn.Linear if base.was_conv1d else None))
    wide_layer = copy.deepcopy(layer, {id(base): wide}).double()
    wide_layer.merge(safe_merge=True, adapter_names=adapters)
    merged = with_tensor(base, base.tensor.plus(wide.weight.view(weight.shape) - weight))
    if wide._parameters.get("bias") is not None:
        merged.bias = nn.Parameter(wide.bias.detach().to(base.bias.dtype), requires_grad=False)
    return merged


def _factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """Left and right factor of Delta in the layout of the codes."""
    # Float32 products by oneDNN (training) and MKL (merging) differ in the last bits, which would
    # move codes at a tie (docs/log/training.md). Hence float64.
    if isinstance(layer, Embedding):
        right, left = layer.lora_embedding_B[adapter].T, layer.lora_embedding_A[adapter].T
    else:
        left, right = (f[adapter].weight.flatten(1) for f in (layer.lora_B, layer.lora_A))
    return left.detach().double() * layer.scaling[adapter], right.detach().double()


def _branch(layer: Any, adapter: str, x: Tensor) -> Tensor:
    """The branch of an ordinary adapter: its gradients are those of the factors."""
    scaling = layer.scaling[adapter]
    if not isinstance(layer, Embedding):
        x = layer._cast_input_dtype(x, layer.lora_A[adapter].weight.dtype)
        return layer.lora_B[adapter](layer.lora_A[adapter](x)) * scaling
    u = nn.functional.embedding(x, layer.lora_embedding_A[adapter].T)
    u = u @ layer.lora_embedding_B[adapter].T * scaling
    factor = layer._get_embed_scale()  # of embeddings that scale their output, as Gemma's
    return u if factor is None else u * factor.to(u.dtype)


class _StraightThrough(torch.autograd.Function):
    """y, with the gradient of y + u."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor) -> Tensor:
        # Without `detach` it is a view for autograd, and Falcon, which adds to a layer's output in
        # place, fails.
        return y.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient
