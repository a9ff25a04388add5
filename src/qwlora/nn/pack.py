"""From a float module to a packed one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.errors import GridError
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn.instance_forward import instance_forward_problem, move_hook_, state_without_hook
from qwlora.nn.packed_layer import PackedLayer, is_packed
from qwlora.nn.packed_modules import PackedLinear, packed_class
from qwlora.nn.packed_tensor import PackedTensor, Parts


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
