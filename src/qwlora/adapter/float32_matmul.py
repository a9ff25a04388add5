"""Float32 products by oneDNN, where they are float32 in truth.

MKL, which torch takes, keeps AVX-512 from processors that are not Intel's: there oneDNN is faster by an eighth on products as large as a layer's. Torch takes
oneDNN at the float32 precision `medium`, which also allows bfloat16 inside where the processor has units for it (AMX); whether it is used is found by
multiplying. Accelerators have settings of their own and keep them, as does who has chosen a precision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_EXACT = 1e-5  # of the largest sum of 512 products: float32 misses by 1e-6, TF32 by 7e-4, bfloat16 by 2e-3


@contextlib.contextmanager
def float32_by_onednn(device: torch.device | str = "cpu") -> Iterator[None]:
    """While it lasts, float32 products on a CPU are oneDNN's, if those are exact."""
    if torch.device(device).type != "cpu" or torch.get_float32_matmul_precision() != "highest":
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        if not _products_are_exact():
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _products_are_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(512, 512, generator=generator), torch.randn(1024, 512, generator=generator)
    y = x @ w.T
    return all(_is_exact(*product) for product in ((y, x, w.T), (y @ w, y, w)))


def _is_exact(found: Tensor, left: Tensor, right: Tensor) -> bool:
    exact = left.double() @ right.double()
    return float((found - exact).abs().max()) < _EXACT * float(exact.abs().max())
