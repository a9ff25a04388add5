"""Refuse tensors without values, and values that are no numbers, before something reads them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from qwlora.errors import CalibrationError, QwloraError, listed
from qwlora.nn.fingerprint import base_tensors


def check_finite(name: str, tensor: Tensor, allow_infinity: bool = False) -> None:
    """See that `tensor` holds no NaN and no infinity; tensors without data or floats pass.

    Args:
        allow_infinity: for buffers, which may be attention masks.
    """
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return
    values = tensor.detach()
    values = values if values.element_size() > 1 else values.float()
    low, high = values.aminmax()  # NaN propagates; allocates nothing
    if bool(torch.isfinite(low) & torch.isfinite(high)):
        return
    nan, infinite = values.isnan(), values.isinf()
    bad = nan if allow_infinity else nan | infinite
    if not bool(bad.any()):
        return
    counts = ((int(nan.sum()), "NaN"), (int((bad & infinite).sum()), "infinite"))
    found = " and ".join(f"{count} {what}" for count, what in counts if count)
    first = bad.nonzero()[0].tolist()
    index = first[0] if len(first) == 1 else first
    raise CalibrationError(
        f"{name} contains {found} (first at index {index}). QWLoRA cannot freeze a model with "
        "non-finite weights; check the checkpoint"
    )


def check_base_finite(module: nn.Module, path: str = "") -> None:
    """`check_finite` for every tensor of the base in `module`, which is at `path` of its model."""
    for name, (layout, tensor) in base_tensors(module).items():
        check_finite(
            f"{path}.{name}" if path else name,
            tensor,
            allow_infinity=not layout and not isinstance(tensor, nn.Parameter),
        )


def refuse_meta(model: nn.Module, error: type[QwloraError]) -> None:
    """Refuse a model with tensors on the meta device."""
    named = chain(model.named_parameters(), model.named_buffers())
    if names := [name for name, tensor in named if tensor.is_meta]:
        raise error(
            f"{listed(names, 3)} are on the meta device and have no values. Load the "
            "weights first (from_pretrained without device_map offloading). For a checkpoint "
            "larger than memory use `qwlora quantize`, which reads it block by block"
        )
