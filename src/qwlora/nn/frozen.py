"""Checks of a model: its packed layers compute their codes, and its tensors have finite values.

    assert_frozen(model)

`quantize_`, `train_adapter`, `simulate`, `save_base` and `save_adapter` call it. Call it yourself
after changing a quantized model: placing hooks, patching a forward, loading weights into it.

"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from qwlora.errors import CalibrationError, GridError, QwloraError, lines, listed
from qwlora.nn.fingerprint import base_tensors
from qwlora.nn.packed_layer import instance_calls, packed_layers, unwrapped

_HALF = "_half_quantized"  # set on a model when `packing` fails


def assert_frozen(model: nn.Module) -> None:
    """Check that `model` has packed layers and that each of them computes its codes.

    Raises:
        GridError: the model has no packed layer, quantizing it failed halfway, a forward was set on
            packed layers, or PEFT's `modules_to_save` holds copies of them.
    """
    refuse_half_quantized(model)
    packed = packed_layers(model)
    if not packed:
        raise GridError(
            f"{type(unwrapped(model)).__name__} has no packed layer: its weights are floats. "
            "Call qwlora.quantize_ or qwlora.load_base first"
        )
    # With the forward of its class, a layer computes its codes by construction, so attributes are
    # looked at only. What any other forward computes cannot be known; forward hooks are fine.
    if patched := [name for name, at in packed.items() if "forward" in instance_calls(at)]:
        raise GridError(
            f"{len(patched)} packed layers have a forward that was set on the instance, so they "
            "may not compute their codes. Delete it (`del layer.forward`), or use a forward hook"
            + "\n  ".join(["", *lines(patched)])
        )
    if copies := [name for name in packed if "modules_to_save" in name.split(".")]:
        raise GridError(
            f"PEFT's modules_to_save copied {listed(copies)}, whose integers cannot be trained. "
            "Leave these out, or keep them as floats in the base, by a rule with keep: float"
        )


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Mark `model` if the block raises after packing a layer: only some layers are packed then."""
    before = len(packed_layers(model))
    try:
        yield
    except BaseException:
        if len(packed_layers(model)) > before:
            vars(model)[_HALF] = True
        raise


def refuse_half_quantized(model: nn.Module) -> None:
    """Refuse a model on which `packing` failed."""
    if any(_HALF in vars(module) for module in model.modules()):
        raise GridError(
            f"quantizing this {type(unwrapped(model)).__name__} failed halfway: some of its layers "
            "are packed, the others are not. Load the float model again"
        )


def check_finite(name: str, tensor: Tensor, allow_infinity: bool = False) -> None:
    """Refuse a tensor with NaN, or with infinity unless that is allowed."""
    # a buffer may be a mask
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return
    # aminmax of torch 2.13 does not take floats of 8 bits
    values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()
    # NaN propagates to both ends; a mask as large as the tensor is made only if one is not finite
    low, high = values.aminmax()
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    bad = values.isnan() if allow_infinity else ~values.isfinite()
    if bool(bad.any()):
        raise CalibrationError(
            f"{name} contains {int(bad.sum())} values that are NaN or infinite, the first at index "
            f"{bad.nonzero()[0].tolist()}. QWLoRA cannot freeze a model with non-finite weights; "
            "check the checkpoint"
        )


def check_base_finite(module: nn.Module) -> None:
    """`check_finite` for every tensor of the base in `module`."""
    # scales and minimums of packed layers are buffers too, but never masks
    for name, (layout, tensor) in base_tensors(module).items():
        is_buffer = not layout and not isinstance(tensor, nn.Parameter)
        check_finite(name, tensor, allow_infinity=is_buffer)


def refuse_meta(model: nn.Module, error: type[QwloraError]) -> None:
    """Refuse a model with tensors on the meta device."""
    named = chain(model.named_parameters(), model.named_buffers())
    if names := [name for name, tensor in named if tensor.is_meta]:
        raise error(
            f"{listed(names, 3)} are on the meta device and have no values. Load the "
            "weights first (from_pretrained without device_map offloading). For a checkpoint "
            "larger than memory use `qwlora quantize`, which reads it block by block"
        )
