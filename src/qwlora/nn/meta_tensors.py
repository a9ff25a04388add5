"""Refuse models whose tensors have no values, before something reads them."""

from __future__ import annotations

from itertools import chain

from torch import nn

from qwlora.errors import QwloraError


def refuse_meta(model: nn.Module, error: type[QwloraError]) -> None:
    """Refuse a model with tensors on the meta device.

    Raises:
        QwloraError: of type `error`; the first tensors are named.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    names = [name for name, tensor in named if tensor.is_meta]
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise error(
            f"{', '.join(names[:3])}{more} are on the meta device and have no values. Load the "
            "weights "
            "first (from_pretrained without device_map offloading). For a checkpoint larger than "
            "memory "
            "use `qwlora quantize`, which reads it block by block"
        )
