"""The model inside the wrappers that torch puts around a whole model."""

from __future__ import annotations

import sys

from torch import nn


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
