"""vLLM in this process, on a CPU. Import it before vLLM, which reads the environment once.

The wheel's product with 4-bit weights needs AVX-512, and does not take float32. There `_product`
stands in for it; it reads what vLLM made of our files.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
from vllm import _custom_ops as operators
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32 as unpack,
)
from vllm.scalar_type import scalar_types

HAS_OPERATOR = hasattr(torch.ops._C, "cpu_gemm_wna16")


@contextmanager
def operator_of_cpu() -> Iterator[None]:
    """The product as the wheel has it, or else ours."""
    own = operators.cpu_gemm_wna16

    def product(input: Tensor, **others: Any) -> Tensor:
        is_own = HAS_OPERATOR and input.dtype != torch.float32
        return (own if is_own else _product)(input=input, **others)

    with patch.object(operators, "cpu_gemm_wna16", product):
        yield


def _product(
    input: Tensor,
    q_weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    pack_factor: int,
    isa_hint: str,
) -> Tensor:
    """input @ ((codes - zero points) * scales) + bias, of weights in blocks of 16 outputs."""
    inputs = input.shape[-1]
    blocks = q_weight.view(-1, inputs, 16 // pack_factor).permute(1, 0, 2)
    codes = unpack(blocks.reshape(inputs, -1), scalar_types.uint4, 1)
    size = inputs // len(scales)
    zero = 8 if zeros is None else unpack(zeros, scalar_types.uint4, 1).repeat_interleave(size, 0)
    weight = (codes - zero) * scales.float().repeat_interleave(size, 0)
    result = input.float() @ weight + (0 if bias is None else bias.float())
    return result.to(input.dtype)
