"""Adapters of different ranks and layers in one shape: zeros fill what an adapter lacks.

    [lora_A; 0] and [lora_B 0]     where its rank is lower than the largest of all adapters
    0 and 0                        in a layer that only other adapters change

So it computes the same, and one graph has a place for every adapter.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from qwlora.adapter.attach import restored_adapters
from qwlora.adapter.mergeable import lora_layers
from qwlora.errors import CaptureError, TrainingError, listed
from qwlora.system.parameter_names import is_factor_name

_LAST = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}  # axis of the rank
_WRAPPING = "qwlora_padding"


def common_ranks(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """The largest rank of some adapters, for every layer that one of them changes, by path. Empty
    if they already have one shape, or cannot be padded."""
    layers = {path: layer for path, layer in lora_layers(model) if {*names} & {*layer.r}}
    ranks = [{p: layer.r[name] for p, layer in layers.items() if name in layer.r} for name in names]
    for layer in layers.values():
        is_grouped = getattr(layer.get_base_layer(), "groups", 1) > 1
        # Zeros pad two factors. DoRA, experts and convolutions in groups are more than that.
        if isinstance(layer, ParamWrapper) or layer.lora_variant or is_grouped:
            return {}
    return one_rank(ranks)


def one_rank(ranks: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """`common_ranks` of adapters with these ranks by path of the layer."""
    if all(by_layer == ranks[0] for by_layer in ranks):
        return {}
    largest = max(rank for by_layer in ranks for rank in by_layer.values())
    return {layer: largest for by_layer in ranks for layer in by_layer}


def check_one_shape(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], experts: bool) -> None:
    """Check that adapters, by name with the shapes of their weights, can be padded to one shape,
    for encodings that all of them share. `experts`: factors are of experts, never padded."""
    (first, known), *others = shapes.items()
    for name, shapes_of_other in others:
        names = sorted(known.keys() | shapes_of_other.keys())
        fixed = (n for n in names if experts or not is_factor_name(n))
        if differ := [n for n in fixed if known.get(n) != shapes_of_other.get(n)]:
            both = known, shapes_of_other
            known_shape, other_shape = (list(shape.get(differ[0], ())) or "none" for shape in both)
            raise TrainingError(
                f"adapters {first} and {name} cannot share all encodings "
                f"(simulation.base_activations none): {len(differ)} weights differ, for example "
                f"{differ[0]}: {known_shape} and {other_shape}. Factors of layers are padded to "
                "one shape, but not those of experts, DoRA and modules_to_save; give them equal "
                "shapes, or use base_activations: adapter_only"
            )


@contextlib.contextmanager
def _wrapped(model: nn.Module, layers: Collection[str]) -> Iterator[None]:
    """Until the context ends, `layers` that are not yet LoRA layers are, without an adapter."""
    missing = sorted({*layers} - dict(lora_layers(model)).keys())
    if missing and not isinstance(model, PeftModel):
        raise CaptureError(
            f"{listed(missing, 3)}: other adapters have LoRA here, the attached one has not. "
            "Attach one first that has, or load the adapter with PeftModel.from_pretrained"
        )
    with contextlib.ExitStack() as stack:
        if isinstance(model, PeftModel) and missing:
            stack.enter_context(restored_adapters(model))
            tuner = model.base_model
            stack.callback(setattr, tuner, "targeted_module_names", tuner.targeted_module_names[:])
            # PEFT makes LoRA layers only for an adapter, so one is added and deleted. It takes a
            # name in a list for the end of others too, so the names are a regular expression.
            pattern = "|".join(map(re.escape, missing))
            model.add_adapter(_WRAPPING, LoraConfig(target_modules=pattern))
            model.delete_adapter(_WRAPPING)
            model.train(model.training)  # new modules are in training mode
            for path in missing:
                parent, _, child = path.rpartition(".")
                layer = tuner.model.get_submodule(path)
                owner = tuner.model.get_submodule(parent)
                stack.callback(setattr, owner, child, layer.get_base_layer())
        yield


@contextlib.contextmanager
def padded_adapters(
    model: nn.Module, names: Sequence[str], ranks: Mapping[str, int]
) -> Iterator[None]:
    """Pad adapters of `model` to these ranks by path of the layer, until the context ends."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_wrapped(model, ranks if names else ()))
        layers = dict(lora_layers(model))
        for name in names:
            changed = [layer for layer in layers.values() if name in layer.r]
            for path in ranks.keys() & layers.keys():
                layer, rank = layers[path], ranks[path]
                if name in layer.r:
                    for holder, attribute, axis in _factors(layer, name):
                        stack.callback(setattr, holder, attribute, getattr(holder, attribute))
                        _pad_(holder, attribute, axis, rank)
                else:
                    stack.callback(_remove_, layer, name)
                    _add_zeros_(layer, name, rank, changed[0].scaling[name])
        yield


def _factors(layer: Any, name: str) -> Iterator[tuple[Any, str, int]]:
    """Where the parameters of an adapter's factors are, and the axis of the rank."""
    for factor, axis in _LAST.items():
        if name in (factors := getattr(layer, factor)):
            of_embedding = isinstance(factors, nn.ParameterDict)
            yield (factors, name, axis) if of_embedding else (factors[name], "weight", axis)


def _pad_(holder: Any, attribute: str, axis: int, rank: int) -> None:
    parameter = getattr(holder, attribute)
    if parameter.shape[axis] < rank:
        # `pad` takes pairs from the last axis to the first.
        after = [0, 0] * (parameter.ndim - axis - 1)
        padded = nn.functional.pad(parameter.detach(), [*after, 0, rank - parameter.shape[axis]])
        setattr(holder, attribute, nn.Parameter(padded, parameter.requires_grad))


def _add_zeros_(layer: Any, name: str, rank: int, scaling: float) -> None:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        layer.update_layer(name, rank, rank, config=LoraConfig(init_lora_weights=False))
        for holder, attribute, _ in _factors(layer, name):
            getattr(holder, attribute).zero_()
    # A graph holds one scaling for all layers of an adapter (`device_graph.scaling_of`).
    layer.scaling[name] = scaling
    layer.train(layer.training)  # new modules are in training mode


def _remove_(layer: Any, name: str) -> None:
    # PEFT's own `delete_adapter` would make another adapter the active one.
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        if name in (values := getattr(layer, attribute)):
            del values[name]
