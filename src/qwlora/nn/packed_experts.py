"""Packed 3-D parameters: the fused experts of a mixture, in whatever module has them.

    pack_parameter_(experts, "gate_up_proj", quantized)     codes [experts, out, in]

The module keeps its class (a subclass of it, made for this) and its forward. Where that reads the parameter it gets a look, which unpacks one expert at a time;
the codes lie in `experts.packed_parameters.gate_up_proj`. PEFT's `target_parameters` finds the parameter and folds its delta into it, which takes all experts
as floats for one layer's forward and, without gradient checkpointing, until its backward: PEFT does so for float experts too.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.errors import GridError
from qwlora.grid.quantized_tensor import QuantizedTensor
from qwlora.grid.scheme import Scheme
from qwlora.nn.custom_ops import dequantize
from qwlora.nn.packed_layer import PackedLayer, traced
from qwlora.nn.packed_matmul import Part
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.nn.weight_view import Look, refuse_write
from qwlora.parameter_names import FOLDER


class PackedParameter(PackedLayer):
    """The codes of one parameter.

    Args:
        turned: whether the module has the parameter as [experts, in, out].
    """

    def __init__(self, tensor: PackedTensor, turned: bool, dtype: torch.dtype):
        super().__init__()
        self.turned = turned
        experts, rows, columns = tensor.shape
        self._take(tensor, None, (experts, columns, rows) if turned else tensor.shape, dtype)

    @property
    def weight(self) -> Tensor:
        if traced():
            values = dequantize(*self.operands).to(self.compute_dtype)
            return values.mT if self.turned else values
        return Look(Part(self, self.weight_shape, turned=self.turned))


class _WithPackedParameters(nn.Module):
    """The part of the made class that is the same for all."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for name, parameter in self._modules[FOLDER]._modules.items():  # type: ignore[union-attr]
            if (
                name in self._buffers
            ):  # who asks this module itself, as PEFT does, wants to know what it has; a model lists its floats alone
                yield f"{prefix}.{name}" if prefix else name, parameter.weight  # type: ignore[misc, union-attr]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if isinstance(
            tensor, Look
        ):  # torch puts back a parameter that was parametrized for one forward
            self._buffers[name] = None
        else:
            super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in self.__dict__["_modules"].get(FOLDER, {}):
            refuse_write()
        super().__setattr__(name, value)


def parameter_out_in(module: nn.Module, name: str) -> Tensor:
    """A 3-D parameter as [experts, out, in]. Modules that store it as [experts, in, out] say so by an attribute `is_transposed`, as in transformers and PEFT.

    Raises:
        GridError: there is no such parameter.
    """
    parameter = module._parameters.get(name)
    if parameter is None or parameter.ndim != 3 or not parameter.is_floating_point():
        raise GridError(f"{type(module).__name__} has no float parameter {name!r} with three axes")
    return parameter.mT if getattr(module, "is_transposed", False) else parameter


def pack_parameter_(module: nn.Module, name: str, quantized: QuantizedTensor) -> PackedParameter:
    """Put codes [experts, out, in] in the place of the parameter `name` of `module`, in place; returns what holds them.

    Raises:
        GridError: there is no such parameter, or the codes are not of its shape.
    """
    return _put(module, name, PackedTensor.from_quantized(quantized))


def empty_packed_parameter_(
    module: nn.Module,
    name: str,
    scheme: Scheme,
    device: torch.device | str = "meta",
    dtype: torch.dtype = torch.float16,
) -> PackedParameter:
    """`pack_parameter_` without contents, to be read from a file.

    Raises:
        GridError: there is no such parameter, or the scheme does not fit it.
    """
    return _put(
        module,
        name,
        PackedTensor.empty(scheme, tuple(parameter_out_in(module, name).shape), device, dtype),
    )


def _put(module: nn.Module, name: str, tensor: PackedTensor) -> PackedParameter:
    expected = parameter_out_in(module, name)
    if tensor.shape != tuple(expected.shape):
        raise GridError(
            f"codes of shape {list(tensor.shape)} do not stand for {name} of {type(module).__name__}, which is {list(expected.shape)}"
        )
    packed = PackedParameter(
        tensor, bool(getattr(module, "is_transposed", False)), expected.dtype
    ).train(module.training)
    if FOLDER not in module._modules:
        module.add_module(FOLDER, nn.ModuleDict().train(module.training))
    module._modules[FOLDER]._modules[name] = packed  # type: ignore[union-attr]
    del module._parameters[name]
    module._buffers[name] = None
    names = tuple(module._modules[FOLDER]._modules)  # type: ignore[union-attr]
    plain: Any = next(
        kind for kind in type(module).__mro__ if not issubclass(kind, _WithPackedParameters)
    )
    module.__class__ = _class_with(plain, names)
    return packed


@cache
def _class_with(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    return type(
        f"Packed{kind.__name__}",
        (_WithPackedParameters, kind),
        {name: _reader(name) for name in names},
    )


def _reader(name: str) -> property:
    def read(module: nn.Module) -> Tensor:
        if (
            name not in module._buffers
        ):  # it is being parametrized, and torch makes sure that nothing of the name is left
            raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
        return module._modules[FOLDER]._modules[name].weight  # type: ignore[union-attr, return-value]

    return property(read)
