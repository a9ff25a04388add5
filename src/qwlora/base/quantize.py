"""Replace a model's Linear layers by packed ones, one at a time, so that a float weight is gone before the next is read.

Quantized: every `torch.nn.Linear` and GPT-2 style `Conv1D` (stored transposed, so that blocks always run along the input) that does not belong to an adapter
and does not share its weight with another module. A tied output head therefore stays float with its embedding. Works before or after PEFT has wrapped the
layers: only the innermost base layer is replaced.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qwlora.base.packed import PackedLinear
from qwlora.base.solver import solve
from qwlora.errors import CalibrationError, GridError
from qwlora.grid.names import canonical_name, is_adapter_name
from qwlora.grid.presets import weight_scheme
from qwlora.grid.scheme import Scheme
from qwlora.progress import Track, untracked


@dataclass(frozen=True)
class BaseSize:
    """What the packed layers weigh (codes, scales and offsets), and how many weights the model holds beside them, as floats."""

    bytes: int
    weights: int
    float_weights: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


def quantize_(model: nn.Module, scheme: Scheme | str, solver: str = "search", track: Track = untracked) -> BaseSize:
    """Quantize the Linear layers of `model` in place.

    Args:
        scheme: the grid of every weight, or its short name (`w4-block32`, `w4a16`, see `weight_scheme`).
        solver: `rtn` or `search` (see `solver.py`).

    Returns:
        The size of the packed layers.

    Raises:
        GridError: the scheme does not fit a layer (all such layers are named), or there is nothing to quantize.
    """
    scheme = weight_scheme(scheme) if isinstance(scheme, str) else scheme
    layers = find_layers(model)
    if not layers:
        raise GridError("the model has no Linear layer left to quantize")
    check_fit(layers, scheme)
    for name in track(list(layers), "quantizing", len(layers)):
        layer = layers.pop(name)
        try:
            codes, encoding = solve(_weight_out_in(layer), scheme, solver)
        except CalibrationError as error:
            raise CalibrationError(f"{canonical_name(name)}.weight: {error}") from error
        model.set_submodule(name, PackedLinear.from_codes(codes, encoding, layer.bias).train(layer.training))
    return base_size(model)


def find_layers(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """The layers that `quantize_` replaces, by module path."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not isinstance(module, PackedLinear)
        and "weight" in module._parameters
        and not is_adapter_name(name)
        and owners[id(module.weight)] == 1
    }


def check_fit(layers: dict[str, nn.Linear | Conv1D], scheme: Scheme) -> None:
    """Refuse a scheme that does not fit, naming every layer before any is changed."""
    misfits = []
    for name, layer in layers.items():
        try:
            scheme.scale_shape(tuple(_weight_out_in(layer).shape))
        except GridError as error:
            misfits.append(f"{canonical_name(name)}: {error}")
    if misfits:
        shown = "\n  ".join(misfits[:5] + ([f"and {len(misfits) - 5} more"] if len(misfits) > 5 else []))
        raise GridError(f"{scheme} does not fit {len(misfits)} of {len(layers)} layers; choose a block size that divides their input\n  {shown}")


def base_size(model: nn.Module) -> BaseSize:
    """Bytes and count of all packed weights in `model`."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    tensors = [t for layer in packed for t in (layer.packed, layer.scale, layer.offset) if t is not None]
    floats = sum(p.numel() for name, p in model.named_parameters() if not is_adapter_name(name))
    return BaseSize(sum(t.nbytes for t in tensors), sum(layer.in_features * layer.out_features for layer in packed), floats)


def _weight_out_in(layer: nn.Linear | Conv1D) -> Tensor:
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight
