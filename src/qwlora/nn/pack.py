"""From float modules to packed layers in a model, by the names of its float tensors, and back.

pack_at_(model, name, quantized)     pack one tensor and whatever is tied to it
place_empty_(model, path, scheme)    the same with empty buffers, by the path of the packed layer
tie_weights_(model)                  tied output heads read the codes of a packed embedding
packed_weights(model)                {"model.layers.0.mlp.up_proj.weight": layer,
                                      "model.layers.0.mlp.experts.down_proj": layer, ...}
unpack_(model)                       float layers whose weights are the dequantized codes, to merge
pack_module(module, quantized)       one module
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError, MergeError
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn.instance_forward import instance_forward_problem, move_hook_, state_without_hook
from qwlora.nn.packed_experts import PackedParameter, empty_packed_parameter_, pack_parameter_
from qwlora.nn.packed_layer import PackedLayer, is_packed
from qwlora.nn.packed_matmul import PackedWeightOwner
from qwlora.nn.packed_modules import PackedLinear, packed_class
from qwlora.nn.packed_tensor import PackedTensor, Parts
from qwlora.parameter_names import FOLDER, canonical_name, parameter_name


def is_packable(module: nn.Module) -> bool:
    """Whether `pack_module` accepts `module`: a float Linear, Conv1D, Embedding, Conv1d, Conv2d or
    a subclass, whose weight is its own parameter.
    """
    weight = module._parameters.get("weight")
    if (
        is_packed(module)
        or weight is None
        or not weight.is_floating_point()
        or getattr(module, "max_norm", None) is not None
    ):
        return False
    return _is_of_packable_class(module)


def has_computed_weight(module: nn.Module) -> bool:
    """Whether `module` is of a class that `pack_module` takes, but computes its weight in each
    forward from other tensors: weight_norm, spectral_norm, pruning, any parametrization."""
    return (
        not is_packed(module)
        and module._parameters.get("weight") is None
        and _is_of_packable_class(module)
    )


def _is_of_packable_class(module: nn.Module) -> bool:
    return isinstance(module, Conv1D) or packed_class(type(module)) is not None


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight as [out, in], blocks along `in`: Conv1D transposed, a kernel flattened, an
    embedding's rows as they are; float32 if packed.

    Raises:
        GridError: the module is none of these.
    """
    if isinstance(module, PackedLayer) and is_packed(module):
        return module.tensor.dequantize()
    if not is_packable(module):
        raise GridError(
            f"{type(module).__name__} has no weight that can be packed. Linear, Conv1D, Embedding, "
            "Conv1d and Conv2d have one."
        )
    weight: Any = module.weight
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def pack_module(module: nn.Module, quantized: QuantizedTensor) -> nn.Module:
    """A packed layer that replaces `module`: codes of `quantized` [out, in]; bias, training mode
    and all other attributes are kept.

    Raises:
        GridError: the module cannot be packed, the codes have another shape, or as
            `PackedTensor.from_quantized`.
    """
    return _packed(module, PackedTensor.from_quantized(quantized), None)


def empty_packed(
    module: nn.Module,
    scheme: Scheme,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float16,
) -> nn.Module:
    """`pack_module` with empty buffers on `device`, to load with `load_state_dict(assign=True)`.

    Raises:
        GridError: the module cannot be packed, or the scheme does not fit it.
    """
    return _packed(
        module, PackedTensor.empty(scheme, tuple(weight_out_in(module).shape), device, dtype), None
    )


def pack_tied(module: nn.Module, owner: nn.Module) -> nn.Module:
    """A layer that replaces `module` and reads the codes of the packed layer `owner`: an output
    head tied to the embedding.

    Raises:
        GridError: `owner` is not packed, or the shapes differ.
    """
    if not isinstance(owner, PackedLayer) or not is_packed(owner):
        raise GridError(
            f"{type(owner).__name__} is not packed, so no layer can share its codes. Pack it first."
        )
    return _packed(module, None, owner)


def _packed(module: nn.Module, tensor: PackedTensor | None, owner: PackedLayer | None) -> nn.Module:
    weight = weight_out_in(module)
    shape = (tensor or owner.tensor).shape  # type: ignore[union-attr]
    if is_packed(module) or shape != tuple(weight.shape):
        raise GridError(
            f"the codes have shape {list(shape)}, but the weight of {module} has "
            f"{list(weight.shape)}"
        )
    if problem := instance_forward_problem(module):
        raise GridError(f"this {type(module).__name__} {problem}")
    if isinstance(module, Conv1D):
        linear = PackedLinear.build(tensor, owner, module.bias, weight.dtype).train(module.training)
        linear.was_conv1d = True
        move_hook_(module, linear)
        return linear
    kind = packed_class(type(module))
    assert kind is not None
    if taken := [name for name in ("scheme", "tensor", *Parts._fields) if hasattr(module, name)]:
        raise GridError(
            f"{type(module).__name__} already has an attribute {taken[0]!r}, where a packed layer "
            "stores its codes"
        )
    layer = kind.__new__(kind)
    layer.__dict__.update(state_without_hook(module))
    layer.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    full = tuple(layer._parameters.pop("weight").shape)  # type: ignore[union-attr]
    layer._take(tensor, owner, full, weight.dtype)
    move_hook_(module, layer)
    return layer


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


class UnpackedConv1D(nn.Linear):
    """A float layer that replaces a packed Conv1D, with the weight as [out, in]."""


def unpack_(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Replace every packed layer of `model` by its float class, in place. Tied layers share one
    parameter. What replaced a Conv1D becomes an `UnpackedConv1D`, because a PEFT layer may wrap it
    as a Linear; `restore_conv1d_` makes it a Conv1D again.

    Returns:
        The packed tensors by their canonical names.

    Raises:
        MergeError: the model has fused experts, which stay packed.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)
    }
    if experts := [name for name, module in layers.items() if isinstance(module, PackedParameter)]:
        raise MergeError(
            f"{canonical_name(experts[0])}: fused experts cannot be unpacked to floats, so nothing "
            "can be merged into this model. Keep the adapter separate."
        )
    for name, layer in layers.items():
        if problem := instance_forward_problem(layer):
            raise MergeError(f"{canonical_name(name)} {problem}")
    parameters: dict[int, nn.Parameter] = {}
    found = {}
    for name, layer in layers.items():
        key = layer.tensor.parts.packed.data_ptr()
        if key not in parameters:
            parameters[key] = nn.Parameter(
                layer.quantized.dequantize().to(layer.compute_dtype).view(layer.weight_shape),
                requires_grad=False,
            )
            found[f"{canonical_name(name)}.weight"] = layer.quantized
        model.set_submodule(name, _float_module(layer, parameters[key]))
    return found


def restore_conv1d_(model: nn.Module) -> None:
    """Replace each `UnpackedConv1D` by a Conv1D. Call it after the adapters are removed."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, UnpackedConv1D):
            conv1d = Conv1D(0, 0).train(linear.training)
            conv1d.nf, conv1d.nx = linear.weight.shape
            conv1d.weight, conv1d.bias = (
                nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=False),
                linear.bias,
            )
            model.set_submodule(name, conv1d)


def _float_module(layer: PackedLayer, weight: nn.Parameter) -> nn.Module:
    kind = (
        UnpackedConv1D
        if isinstance(layer, PackedLinear) and layer.was_conv1d
        else next(
            k
            for k in type(layer).__mro__
            if issubclass(k, nn.Module) and not issubclass(k, PackedWeightOwner)
        )
    )
    module = kind.__new__(kind)
    module.__dict__.update(state_without_hook(layer))
    for name in (*Parts._fields, "weight"):
        module._buffers.pop(name, None)
    for name in ("scheme", "count", "weight_shape", "compute_dtype", "_owner", "was_conv1d"):
        module.__dict__.pop(name, None)
    module._parameters = {"weight": weight, **module._parameters}
    move_hook_(layer, module)
    return module
