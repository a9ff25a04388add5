"""Whether the layers that step 1 packed compute their integer codes.

    assert_frozen(model)

`quantize_`, `train_adapter`, `simulate`, `save_base` and `save_adapter` call it. Call it yourself
after changing a quantized model: placing hooks, patching a forward, loading weights into it.

A packed layer computes its codes by construction if it has the forward of its class, or
accelerate's hook around that, so only attributes are looked at: 3 ms for 210 layers. For any other
forward that was set on a layer, one small input is computed twice, the second time with doubled
scales: a result that stays the same does not come from the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qwlora.errors import GridError
from qwlora.messages import lines
from qwlora.nn import PackedLayer, instance_calls, is_packed
from qwlora.nn.unwrap import unwrapped
from qwlora.parameter_names import canonical_name

_SCALES = ("scale", "minimum")
_ROWS = 64  # of an embedding that are looked up; one may be a padding row of zeros


def assert_frozen(model: nn.Module) -> None:
    """Check that `model` has packed layers and that each of them computes its codes.

    Raises:
        GridError: the model has no packed layer, or a packed layer has a forward of its own that
            computes something else; all such layers are named.
    """
    packed = packed_layers(model)
    if not packed:
        raise GridError(
            f"{type(unwrapped(model)).__name__} has no packed layer: its weights are floats. "
            "Call qwlora.quantize_ or qwlora.load_base first"
        )
    problems = [
        f"{name}: {problem}"
        for name, layer in packed.items()
        if "forward" in instance_calls(layer) and (problem := _problem(layer))
    ]
    if problems:
        what = f"{len(problems)} packed layers do not compute their codes"
        raise GridError("\n  ".join([what, *lines(problems)]))


@contextmanager
def gradients_disabled(module: nn.Module) -> Iterator[None]:
    """Set `requires_grad` of every parameter of `module` to False inside the block."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Every packed layer of `model` by its canonical path."""
    return {
        canonical_name(path): module
        for path, module in unwrapped(model).named_modules()
        if isinstance(module, PackedLayer) and is_packed(module)
    }


def _problem(layer: PackedLayer) -> str | None:
    """What is wrong with the forward that was set on `layer`; None if it depends on the codes."""
    remedy = "delete it (`del layer.forward`), or use a forward hook"
    forward: Any = type(layer).forward
    try:
        x = _small_input(layer)
        with torch.no_grad():
            before, expected = layer.forward(x), forward(layer, x)
            with _doubled_scales(layer):
                after, moved = layer.forward(x), forward(layer, x)
        ignores_codes = torch.equal(before, after) and not torch.equal(expected, moved)
    except Exception as error:  # the forward is anybody's code
        return f"its own forward cannot be checked ({type(error).__name__}: {error}); {remedy}"
    return f"its own forward does not use the packed weight; {remedy}" if ignores_codes else None


def _small_input(layer: PackedLayer) -> Tensor:
    device, dtype = layer.tensor.parts.packed.device, layer.compute_dtype
    if isinstance(layer, nn.Embedding):
        return torch.arange(min(_ROWS, layer.num_embeddings), device=device)
    if isinstance(layer, nn.Linear):
        return torch.ones(1, layer.in_features, device=device, dtype=dtype)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d), type(layer)
    extents = [
        dilation * (size - 1) + 1
        for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)
    ]
    return torch.ones(1, layer.in_channels, *extents, device=device, dtype=dtype)


@contextmanager
def _doubled_scales(layer: PackedLayer) -> Iterator[None]:
    owner = layer._owner[0] if layer._owner is not None else layer
    found = {name: owner._buffers.get(name) for name in _SCALES}
    kept = {name: scale for name, scale in found.items() if scale is not None}
    try:
        owner._buffers.update({name: scale + scale for name, scale in kept.items()})
        yield
    finally:
        owner._buffers.update(kept)
