"""The packed layers of a model, and whether they compute their integer codes.

    assert_frozen(model)

`quantize_`, `train_adapter`, `simulate`, `save_base` and `save_adapter` call it. Call it yourself
after changing a quantized model: placing hooks, patching a forward, loading weights into it.

A packed layer computes its codes by construction if it has the forward of its class, or
accelerate's hook around that, so only attributes are looked at. What any other forward on a layer
computes cannot be known, so it is refused; forward hooks are fine.
"""

from __future__ import annotations

import sys

from torch import nn

from qwlora.errors import GridError, lines
from qwlora.nn.packed_layer import PackedLayer, instance_calls, is_packed
from qwlora.system.parameter_names import canonical_name, parameter_name


def assert_frozen(model: nn.Module) -> None:
    """Check that `model` has packed layers and that each of them computes its codes.

    Raises:
        GridError: the model has no packed layer, or a forward was set on packed layers; all such
            layers are named.
    """
    packed = packed_layers(model)
    if not packed:
        raise GridError(
            f"{type(unwrapped(model)).__name__} has no packed layer: its weights are floats. "
            "Call qwlora.quantize_ or qwlora.load_base first"
        )
    patched = [name for name, layer in packed.items() if "forward" in instance_calls(layer)]
    if patched:
        shown = "\n  ".join(lines(patched))
        raise GridError(
            f"{len(patched)} packed layers have a forward that was set on the instance, so they "
            "may not compute their codes. Delete it (`del layer.forward`), or use a forward hook"
            f"\n  {shown}"
        )


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """Every packed layer of `model`, tied ones included, by its canonical path."""
    return {
        canonical_name(path): module
        for path, module in unwrapped(model).named_modules()
        if is_packed(module)
    }


def packed_weights(model: nn.Module) -> dict[str, PackedLayer]:
    """`packed_layers` by the canonical names of their float tensors."""
    return {parameter_name(path): layer for path, layer in packed_layers(model).items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """`model` without torch.compile's `OptimizedModule`, `DataParallel` and
    `DistributedDataParallel` around it; the model itself if it has none of them."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return model.module
    if "torch._dynamo" in sys.modules:  # slow to import, and without it nothing is compiled
        from torch._dynamo import OptimizedModule

        if isinstance(model, OptimizedModule):
            return model._orig_mod
    return None
