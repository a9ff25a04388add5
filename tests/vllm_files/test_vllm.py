"""vLLM on a CPU computes the files of target `hf`: the base, and two adapters in one batch.

The wheel's operators are compiled for AVX-512; on a processor without it, the product with 4-bit
weights is missing, and `_product` stands in for it, which reads what vLLM made of our files.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="only the environment of make test-vllm has it")
from vllm import LLM, SamplingParams
from vllm import _custom_ops as operators
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32 as unpack,
)
from vllm.scalar_type import scalar_types

pytestmark = pytest.mark.vllm
FOLDER = Path("out/vllm-files")
CASES = sorted(path.name for path in FOLDER.glob("*"))
HAS_OPERATOR = hasattr(torch.ops._C, "cpu_gemm_wna16")
ADAPTERS = ("first", "second")
# Largest difference of a log-probability; activations in float16 have 11 bits.
TOLERANCE = {"float32": 1e-4, "float16": 0.02}


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


@pytest.fixture(autouse=True, scope="module")
def operator() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not HAS_OPERATOR:
            patch.setattr(operators, "cpu_gemm_wna16", _product)
        yield


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_base_and_adapters_are_what_was_trained(case: str, dtype: str) -> None:
    folder, expected = FOLDER / case, json.loads((FOLDER / case / "log_probs.json").read_text())
    options = {"max_loras": 2, "max_lora_rank": 8, "max_logprobs": 256, "enable_lora": True}
    program: Any = LLM(
        str(folder / "base"),
        dtype=dtype,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=8,
        enforce_eager=True,
        **options,
    )
    requests = {
        name: LoRARequest(name, number, str(folder / name))
        for number, name in enumerate(ADAPTERS, 1)
    }
    ids, worst = expected["ids"], dict[str, float]()
    one = SamplingParams(temperature=0, max_tokens=1, logprobs=256, detokenize=False)
    # Of a batch with adapters, requests without one are computed wrongly by vLLM on a CPU.
    for batch in (["none"], [*ADAPTERS], ["none"]):
        jobs = [(state, end) for end in range(1, len(ids)) for state in batch]
        results = program.generate(
            [{"prompt_token_ids": ids[:end]} for _, end in jobs],
            one,
            lora_request=[requests.get(state) for state, _ in jobs],
            use_tqdm=False,
        )
        for (state, end), result in zip(jobs, results, strict=True):
            found = result.outputs[0].logprobs[0][ids[end]].logprob
            off = abs(found - expected[state][end - 1])
            worst[state] = max(worst.get(state, 0.0), off)
    print(case, dtype, worst)
    assert max(worst.values()) < TOLERANCE[dtype]
    first, second = (expected[name] for name in ADAPTERS)
    apart = [
        max(abs(a - b) for a, b in zip(first, x, strict=True)) for x in (second, expected["none"])
    ]
    assert min(apart) > 10 * TOLERANCE[dtype]  # so one for another would be seen
    del program
    gc.collect()
