"""vLLM on a CPU with a bundle of target `hf`: figures like those that a proof has.

    PYTHONPATH=benchmarks:tests PYTHON benchmarks/vllm_cpu.py BUNDLE ADAPTER...

PYTHON is of an environment with vLLM (`nox --session vllm` makes one). Log-probabilities of prompts
fail there with an adapter, so each token of the first sequence is scored as the first one after
those before it. On a processor that the wheel was not compiled for, the product with 4-bit weights
is Python's, and times say nothing. Prints JSON.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vllm_files.vllm_on_cpu import HAS_OPERATOR, operator_of_cpu  # isort: skip
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

TOP, TOKENS = 64, 64  # log-probabilities of a token; tokens that are scored
DECODED, TURNS = 16, 3


class Program:
    """vLLM in float32, with all adapters of a bundle."""

    def __init__(self, bundle: Path, names: list[str]):
        ranks = [
            json.loads((bundle / name / "adapter_config.json").read_text())["r"] for name in names
        ]
        self._vllm: Any = LLM(
            str(bundle / "base"),
            dtype="float32",
            skip_tokenizer_init=True,
            max_model_len=2 * TOKENS,
            max_num_seqs=TOKENS,
            max_logprobs=TOP,
            enforce_eager=True,
            enable_prefix_caching=False,
            enable_lora=True,
            max_loras=len(names),
            max_lora_rank=max(8, *ranks),
        )
        self._requests = {
            name: LoRARequest(name, number, str(bundle / name))
            for number, name in enumerate(names, 1)
        }

    def after(self, prompts: list[list[int]], name: str | None, settings: Any) -> list[Any]:
        given = [{"prompt_token_ids": ids} for ids in prompts]
        request = self._requests.get(name or "")
        return self._vllm.generate(given, settings, lora_request=request, use_tqdm=False)

    def log_probs(self, ids: list[int], name: str | None) -> list[dict[int, float]]:
        """Of each token but the first: the likeliest ones in its place, and itself."""
        # log-probabilities are those before tokens are ruled out
        settings = [
            SamplingParams(max_tokens=1, logprobs=TOP, detokenize=False, allowed_token_ids=[token])
            for token in ids[1:]
        ]
        results = self.after([ids[:end] for end in range(1, len(ids))], name, settings)
        said = [result.outputs[0].logprobs[0] for result in results]
        return [{token: one.logprob for token, one in of.items()} for of in said]

    def seconds(self, prompt: list[int], name: str | None, count: int = 1) -> float:
        began = time.perf_counter()
        settings = SamplingParams(
            temperature=0, max_tokens=count, min_tokens=count, detokenize=False, ignore_eos=True
        )
        self.after([prompt], name, settings)
        return time.perf_counter() - began


def distances(program: Program, reference: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """Of the first sequence, without an adapter or with one."""
    state = "adapter" if name else "base"
    ids = reference["ids"][0, : TOKENS + 1].tolist()
    top, expected = (reference[f"{state}.{part}"][0].tolist() for part in ("top", "log_probs"))
    losses = reference[f"{state}.losses"][0, : len(ids) - 1]
    found = program.log_probs(ids, name)
    off = [
        abs(here[token] - value)
        for here, tokens, values in zip(found, top, expected, strict=False)
        for token, value in zip(tokens, values, strict=True)
        if token in here
    ]
    likeliest = [max(here, key=here.__getitem__) for here in found]
    same = [token == tokens[0] for token, tokens in zip(likeliest, top, strict=False)]
    loss = -sum(here[token] for here, token in zip(found, ids[1:], strict=True))
    return {
        "max_log_prob_difference": max(off),
        "top1_agreement": sum(same) / len(same),
        "perplexity": math.exp(loss / len(found)),
        "reference_perplexity": math.exp(float(losses.mean())),
        "tokens": len(found),
    }


def record(program: Program, bundle: Path, name: str) -> dict[str, Any]:
    """Figures of an adapter."""
    reference = load_file(bundle / "proof" / name / "reference.safetensors")
    prompt = reference["ids"][0, :TOKENS].tolist()
    states = {"base": None, "adapter": name}
    figures = {state: distances(program, reference, of) for state, of in states.items()}
    seconds: dict[Any, list[float]] = {}
    for of, is_switch in [(of, first) for of in (name, None) for first in (True, False)] * TURNS:
        seconds.setdefault((of, is_switch), []).append(program.seconds(prompt[:1], of))
    least = {state: min(each) for state, each in seconds.items()}
    decoding = program.seconds(prompt[:1], name, DECODED)
    return {
        "figures": {
            "exact": {
                **figures,
                "prefill_tokens_per_second": TOKENS / program.seconds(prompt, name),
                "decode_tokens_per_second": DECODED / decoding,
                "switch_seconds": max(least[of, True] - least[of, False] for of in (name, None)),
            },
            "peak_memory_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        },
        "has_operator": HAS_OPERATOR,
    }


def main() -> None:
    bundle, names = Path(sys.argv[1]), sys.argv[2:]
    with operator_of_cpu():
        program = Program(bundle, names)
        records = {name: record(program, bundle, name) for name in names}
    print(json.dumps(records))


if __name__ == "__main__":
    main()
