"""Packed layers in a model, by the names that its tensors have as floats.

packed_weights(model)                {"model.layers.0.mlp.up_proj.weight": layer,
                                      "model.layers.0.mlp.experts.down_proj": layer, ...}
pack_at_(model, name, quantized)     pack one tensor
place_empty_(model, path, scheme)    the same with empty buffers, by the path of the packed layer
tie_weights_(model)                  tied output heads read the codes of a packed embedding
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn.pack import empty_packed, is_packable, pack_module, pack_tied
from qwlora.nn.packed_experts import empty_packed_parameter_, pack_parameter_
from qwlora.nn.packed_layer import PackedLayer, is_packed
from qwlora.parameter_names import FOLDER, parameter_name


def packed_weights(model: nn.Module) -> dict[str, PackedLayer]:
    """Every packed layer of `model`, tied ones included, by the name of its float tensor, without
    the names that an adapter library adds.
    """
    return {
        parameter_name(path): module
        for path, module in model.named_modules()
        if isinstance(module, PackedLayer) and is_packed(module)
    }


def pack_at_(model: nn.Module, name: str, quantized: QuantizedTensor) -> PackedLayer:
    """Pack the tensor `name` of `model`: a module's `weight`, or a 3-D parameter.

    Modules that share the weight (a tied output head) become layers on the same codes.

    Raises:
        GridError: no packed layer can replace it, or the codes have another shape.
        AttributeError: the model has no such module.
    """
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if not (last == "weight" and is_packable(module)):
        return pack_parameter_(module, last, quantized)
    weight = module._parameters["weight"]
    tied = [
        (other, reader)
        for other, reader in model.named_modules()
        if reader is not module and reader._parameters.get("weight") is weight
    ]
    layer = pack_module(module, quantized)
    model.set_submodule(path, layer)
    assert isinstance(layer, PackedLayer)
    for other, reader in tied:
        model.set_submodule(other, pack_tied(reader, layer))
    return layer


def place_empty_(
    model: nn.Module, path: str, scheme: Scheme, device: torch.device | str = "meta"
) -> PackedLayer:
    """Put a packed layer with empty buffers at `path`, its module path in a packed model.

    Raises:
        GridError: the module there cannot be packed, or the scheme does not fit it.
        AttributeError: the model has no such module.
    """
    module_path, folder, name = path.rpartition(f".{FOLDER}.")
    if folder:
        return empty_packed_parameter_(model.get_submodule(module_path), name, scheme, device)
    layer = empty_packed(model.get_submodule(path), scheme, device)
    model.set_submodule(path, layer)
    assert isinstance(layer, PackedLayer)
    return layer


def tie_weights_(model: PreTrainedModel) -> None:
    """`model.tie_weights()` for models with packed layers: a layer that the model's class ties to a
    packed weight is replaced by one on the same codes."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        paths = [name.removesuffix(".weight") for name in (target, source)]
        there, owner = (
            model.get_submodule(path) if path != name else None
            for path, name in zip(paths, (target, source), strict=True)
        )
        if there is not None and owner is not None and is_packed(owner) and not is_packed(there):
            model.set_submodule(paths[0], pack_tied(there, owner))
    model.tie_weights()
