"""Packed 3-D parameters: the fused experts of a mixture, in any module.

    pack_parameter_(experts, "gate_up_proj", tensor)     codes [experts, out, in]

The module becomes an instance of a generated subclass and keeps its forward. Where it reads the
parameter it gets a view, which unpacks one expert at a time; the codes are in
`experts.packed_parameters.gate_up_proj`. PEFT's `target_parameters` finds the parameter and adds
its delta to it, which needs all experts as floats during the layer's forward and, without gradient
checkpointing, until its backward. PEFT does the same with float experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qwlora.errors import GridError
from qwlora.nn.custom_ops import dequantize
from qwlora.nn.packed_layer import PackedLayer, traced
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.nn.weight_view import PackedWeight, WeightView, refuse_write
from qwlora.system.parameter_names import FOLDER


class PackedParameter(PackedLayer):
    """The codes of one parameter; `transposed` if the module stores it as [experts, in, out]."""

    def __init__(self, tensor: PackedTensor, transposed: bool, dtype: torch.dtype):
        super().__init__()
        self.transposed = transposed
        experts, rows, columns = tensor.shape
        self._take(tensor, (experts, columns, rows) if transposed else tensor.shape, dtype)

    @property
    def weight(self) -> Tensor:
        if traced():
            values = dequantize(*self.operands).to(self.compute_dtype)
            return values.mT if self.transposed else values
        return WeightView(PackedWeight(self, self.weight_shape, transposed=self.transposed))


class _WithPackedParameters(nn.Module):
    """What all generated classes share."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        for name, parameter in self._modules[FOLDER]._modules.items():  # type: ignore[union-attr]
            # PEFT asks this module itself. A whole model lists only its float parameters.
            if name in self._buffers:
                path = f"{prefix}.{name}" if prefix else name
                yield path, parameter.weight  # type: ignore[misc, union-attr]

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        # torch registers the original again after a parametrization for one forward
        if isinstance(tensor, WeightView):
            self._buffers[name] = None
        else:
            super().register_buffer(name, tensor, persistent)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and name in self.__dict__["_modules"].get(FOLDER, {}):
            refuse_write()
        super().__setattr__(name, value)


def parameter_out_in(module: nn.Module, name: str) -> Tensor:
    """A 3-D parameter as [experts, out, in]. Modules that store it as [experts, in, out] have the
    attribute `is_transposed`, as in transformers and PEFT."""
    parameter = module._parameters.get(name)
    if parameter is None or parameter.ndim != 3 or not parameter.is_floating_point():
        raise GridError(f"{type(module).__name__} has no float parameter {name!r} with three axes")
    return parameter.mT if getattr(module, "is_transposed", False) else parameter


def pack_parameter_(module: nn.Module, name: str, tensor: PackedTensor) -> PackedParameter:
    """Replace the parameter `name` of `module` by packed codes [experts, out, in], in place.
    Returns the module that holds them."""
    expected = parameter_out_in(module, name)
    if tensor.shape != tuple(expected.shape):
        raise GridError(
            f"the codes have shape {list(tensor.shape)}, but {name} of {type(module).__name__} has "
            f"{list(expected.shape)}"
        )
    is_transposed = bool(getattr(module, "is_transposed", False))
    packed = PackedParameter(tensor, is_transposed, expected.dtype).train(module.training)
    if FOLDER not in module._modules:
        module.add_module(FOLDER, nn.ModuleDict().train(module.training))
    folder = cast(nn.ModuleDict, module._modules[FOLDER])._modules
    folder[name] = packed
    del module._parameters[name]
    module._buffers[name] = None
    plain: Any = next(
        kind for kind in type(module).__mro__ if not issubclass(kind, _WithPackedParameters)
    )
    module.__class__ = _class_with(plain, tuple(folder))
    return packed


@cache
def _class_with(kind: Any, names: tuple[str, ...]) -> type[nn.Module]:
    def read(module: nn.Module, name: str) -> Tensor:
        # While torch parametrizes it, the name must not exist.
        if name not in module._buffers:
            raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
        folder: Any = module._modules[FOLDER]
        weight: Tensor = folder._modules[name].weight
        return weight

    readers = {name: property(partial(read, name=name)) for name in names}
    return type(f"Packed{kind.__name__}", (_WithPackedParameters, kind), readers)
