"""The fingerprint of a base: SHA-256 over every parameter and persistent buffer, which training must not change.

For each tensor of the base in order of name: its name (without what an adapter library wraps around it), the layout of its grid if it is packed, its type and
shape, its bytes. So two bases have one fingerprint exactly if they hold the same codes, scales, offsets and float remainders under the same names; attaching
an adapter does not change it.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from qwlora.grid.names import canonical_name, is_adapter_name
from qwlora.grid.scheme import Scheme


def fingerprint(model: nn.Module) -> str:
    """Hex digest of the base inside `model`, which may carry adapters."""
    digest = hashlib.sha256()
    for name, (layout, tensor) in sorted(base_tensors(model).items()):
        digest.update(f"{name}\0{layout}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """Layout and tensor of each parameter and persistent buffer of the base; a tensor shared by two modules is listed once."""
    found: dict[str, tuple[str, Tensor]] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        scheme = getattr(module, "scheme", None)
        layout = str(scheme) if isinstance(scheme, Scheme) else ""
        own = {**module._parameters, **{k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}}
        for key, tensor in own.items():
            name = f"{path}.{key}" if path else key
            if tensor is None or id(tensor) in seen or is_adapter_name(name):
                continue
            seen.add(id(tensor))
            found[canonical_name(name)] = (layout if key in ("packed", "scale", "offset") else "", tensor)
    return found
