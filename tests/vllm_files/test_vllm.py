"""vLLM on a CPU computes the files of target `hf`: the base, and two adapters in one batch."""

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm_files.vllm_on_cpu", reason="only make test-vllm has vLLM")
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from vllm_files.vllm_on_cpu import operator_of_cpu

pytestmark = pytest.mark.vllm
FOLDER = Path("out/vllm-files")
CASES = sorted(path.name for path in FOLDER.glob("*"))
ADAPTERS = ("first", "second")
# Largest difference of a log-probability; activations in float16 have 11 bits.
TOLERANCE = {"float32": 1e-4, "float16": 0.02}


@pytest.fixture(autouse=True, scope="module")
def operator() -> Iterator[None]:
    with operator_of_cpu():
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
