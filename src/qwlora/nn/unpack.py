"""From a packed module back to a float one, whose weight is the dequantized codes. For merging."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from qwlora.errors import MergeError
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.nn.instance_forward import instance_forward_problem, move_hook_, state_without_hook
from qwlora.nn.packed_experts import PackedParameter
from qwlora.nn.packed_layer import PackedLayer
from qwlora.nn.packed_matmul import PackedWeightOwner
from qwlora.nn.packed_modules import PackedLinear
from qwlora.nn.packed_tensor import Parts
from qwlora.parameter_names import canonical_name


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
