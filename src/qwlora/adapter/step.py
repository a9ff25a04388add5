"""How a training step is computed: all that spares memory or time, and changes numbers by no more than the order in which they are rounded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from peft import PeftModel
from peft.helpers import disable_input_dtype_casting

from qwlora.adapter.apart import kept_apart
from qwlora.adapter.float32 import float32_by_onednn
from qwlora.adapter.fused import fused


@contextlib.contextmanager
def spared(model: PeftModel, autocast: bool, checkpointing: bool) -> Iterator[None]:
    """While it lasts, steps of `model` are computed so.

    Args:
        autocast: whether they run under autocast, which casts what goes into products; PEFT would cast it first to float32.
        checkpointing: whether the model's layers are checkpointed.
    """
    device = next(model.parameters()).device
    with kept_apart(model, checkpointing), disable_input_dtype_casting(model, autocast), fused(model), float32_by_onednn(device):
        yield
