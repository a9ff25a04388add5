"""Packed layers in place of float modules, and back, by the names of a model's float tensors.

pack_at_(model, name, quantized)     pack one tensor and whatever is tied to it
place_empty_(model, path, scheme)    the same with empty buffers, by the path of the packed layer
tie_weights_(model)                  tied output heads read the codes of a packed embedding
unpack_(model)                       float layers whose weights are the dequantized codes, to merge
pack_module(module, quantized)       one module

A packed layer is a new module. accelerate's hooks (`dispatch_model`, `device_map`) are set again on
it. Any other forward that was set on the old module would keep computing its float weight, so such
modules are refused.
"""

from __future__ import annotations

from typing import cast

from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError, MergeError
from qwlora.grid.encoding import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn.packed_layer import (
    PackedLayer,
    PackedParameter,
    accelerate_hook,
    instance_calls,
    is_packed,
    pack_parameter_,
    packed_class,
    parameter_out_in,
)
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.system.parameter_names import FOLDER, canonical_name


def is_packable(module: nn.Module) -> bool:
    """Whether `pack_module` accepts `module`: a float Linear, Conv1D, Embedding, Conv1d, Conv2d or
    a subclass, whose weight is its own parameter."""
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.is_floating_point()
        and getattr(module, "max_norm", None) is None
        and packed_class(type(module)) is not None
    )


def has_computed_weight(module: nn.Module) -> bool:
    """Whether `module` is of a class that `pack_module` takes, but computes its weight in each
    forward from other tensors: weight_norm, spectral_norm, pruning, any parametrization."""
    return (
        not is_packed(module)
        and module._parameters.get("weight") is None
        and packed_class(type(module)) is not None
    )


def replacement_problem(module: nn.Module) -> str | None:
    """Why another module cannot replace `module`; None if one can."""
    if has_computed_weight(module):
        return (
            "computes its weight in each forward (weight_norm or another parametrization, or "
            "pruning). Make the result permanent first: torch.nn.utils.parametrize."
            "remove_parametrizations(layer, 'weight'), remove_weight_norm or prune.remove"
        )
    match instance_calls(module):
        case ["forward", *_]:
            return (
                "has a 'forward' that was set on the instance and would keep computing the old "
                "weight. Delete it (`del layer.forward`) first, and set it again afterwards"
            )
        case [_, *_]:
            return "was compiled by module.compile(); quantize first, then compile"
    hook = accelerate_hook(module)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    if any(isinstance(part, AlignDevicesHook) and part.offload for part in hooks):
        return (
            "is offloaded by accelerate, so its weight is not in memory. Load the model without "
            "offloading, or quantize it from its folder (`qwlora run`, `open_checkpoint`)"
        )
    return None


def weight_out_in(module: nn.Module) -> Tensor:
    """The weight as [out, in], blocks along `in`: Conv1D transposed, a kernel flattened, an
    embedding's rows as they are; float32 if packed."""
    if is_packed(module):
        return module.tensor.dequantize()
    if not is_packable(module):
        raise GridError(
            f"{type(module).__name__} has no weight that can be packed. Linear, Conv1D, Embedding, "
            "Conv1d and Conv2d have one."
        )
    weight = cast(Tensor, module.weight)
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def tensor_out_in(model: nn.Module, name: str) -> Tensor:
    """The float tensor `name` as [out, in], or [experts, out, in]."""
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    is_weight = key == "weight" and is_packable(module)
    return weight_out_in(module) if is_weight else parameter_out_in(module, key)


def pack_module(
    module: nn.Module, source: QuantizedTensor | PackedTensor | PackedLayer
) -> PackedLayer:
    """A packed layer that replaces `module`, on these codes [out, in] or tied to a packed layer (an
    output head that reads the codes of the embedding); bias, training mode and all other attributes
    are kept."""
    if isinstance(source, QuantizedTensor):
        source = PackedTensor.from_quantized(source)
    weight = weight_out_in(module)
    shape = source.shape if isinstance(source, PackedTensor) else source.tensor.shape
    if is_packed(module) or shape != tuple(weight.shape):
        raise GridError(
            f"the codes have shape {list(shape)}, but the weight of {module} has "
            f"{list(weight.shape)}"
        )
    if problem := replacement_problem(module):
        raise GridError(f"this {type(module).__name__} {problem}")
    was_conv1d, hook = isinstance(module, Conv1D), accelerate_hook(module)
    if isinstance(module, Conv1D):
        linear = nn.Linear(module.nx, module.nf, bias=False, device="meta", dtype=weight.dtype)
        linear.bias = module.bias
        module = linear.train(module.training)
    kind = packed_class(type(module))
    assert kind is not None
    layer = kind.from_layer(module, source)
    layer.was_conv1d = was_conv1d
    if hook:
        add_hook_to_module(layer, hook)
    return layer


def pack_at_(model: nn.Module, name: str, quantized: QuantizedTensor) -> PackedLayer:
    """Pack the tensor `name` of `model`: a module's `weight`, or a 3-D parameter.

    Modules that share the weight (a tied output head) become layers on the same codes.
    """
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if not (key == "weight" and is_packable(module)):
        return pack_parameter_(module, key, PackedTensor.from_quantized(quantized))
    weight = module._parameters["weight"]
    tied = [
        (other, reader)
        for other, reader in model.named_modules()
        if reader is not module and reader._parameters.get("weight") is weight
    ]
    layer = pack_module(module, quantized)
    model.set_submodule(path, layer)
    for other, reader in tied:
        model.set_submodule(other, pack_module(reader, layer))
    return layer


def place_empty_(model: nn.Module, path: str, scheme: Scheme) -> PackedLayer:
    """Put a packed layer with buffers on the meta device at `path`, its module path in a packed
    model, to load with `load_state_dict(assign=True)`."""
    module_path, is_expert, name = path.rpartition(f".{FOLDER}.")
    module = model.get_submodule(module_path if is_expert else path)
    weight = parameter_out_in(module, name) if is_expert else weight_out_in(module)
    tensor = PackedTensor.empty(scheme, tuple(weight.shape))
    if is_expert:
        return pack_parameter_(module, name, tensor)
    layer = pack_module(module, tensor)
    model.set_submodule(path, layer)
    return layer


def tie_weights_(model: PreTrainedModel) -> None:
    """`model.tie_weights()` for models with packed layers: a layer that the model's class ties to a
    packed weight is replaced by one on the same codes."""
    for target, source in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if not (target.endswith(".weight") and source.endswith(".weight")):
            continue
        path = target.removesuffix(".weight")
        reader = model.get_submodule(path)
        owner = model.get_submodule(source.removesuffix(".weight"))
        if is_packed(owner) and not is_packed(reader):
            model.set_submodule(path, pack_module(reader, owner))
    model.tie_weights()


def forget_ties_(model: PreTrainedModel) -> None:
    """Let the model's configuration say that no weights are tied, once layers have their own."""
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


class UnpackedConv1D(nn.Linear):
    """A float layer that replaces a packed Conv1D, with the weight as [out, in]."""


def unpack_(model: nn.Module) -> dict[str, QuantizedTensor]:
    """Replace every packed layer of `model` by its float class, in place, and return the packed
    tensors by canonical name. Tied layers share one parameter. What replaced a Conv1D becomes an
    `UnpackedConv1D`, because a PEFT layer may wrap it as a Linear; `restore_conv1d_` makes it a
    Conv1D again. Fused experts and layers with a forward of their own are refused."""
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
    packed = {}
    for name, layer in layers.items():
        key = layer.tensor.parts.packed.data_ptr()
        if key not in parameters:
            packed[f"{canonical_name(name)}.weight"] = quantized = layer.quantized
            values = quantized.dequantize().to(layer.compute_dtype).view(layer.weight_shape)
            parameters[key] = nn.Parameter(values, requires_grad=False)
        conv1d = UnpackedConv1D if layer.was_conv1d else None
        module = layer.to_layer(parameters[key], conv1d)
        if hook := accelerate_hook(layer):
            add_hook_to_module(module, hook)
        model.set_submodule(name, module)
    return packed


def restore_conv1d_(model: nn.Module) -> None:
    """Replace each `UnpackedConv1D` by a Conv1D. Call it after the adapters are removed."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, UnpackedConv1D):
            conv1d = Conv1D(0, 0).train(linear.training)
            conv1d.nf, conv1d.nx = linear.weight.shape
            weight = linear.weight.detach().T.contiguous()
            conv1d.weight = nn.Parameter(weight, requires_grad=False)
            conv1d.bias = linear.bias
            model.set_submodule(name, conv1d)
