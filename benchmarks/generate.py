"""Generating text with SmolLM2-135M: the float model, and a packed base with an adapter, with and
without torch's integer kernels. One thread.

    python benchmarks/generate.py     prints a table and writes benchmarks/results/generate.json
    python benchmarks/generate.py --rounds 1 --tokens 4 --layers 2    a smoke test; writes nothing

The ways take turns in one process. Seconds are processor seconds of the one thread, so that other
programs on the machine count little; a ratio is the median of the ratios of the rounds. `first` is
the time to the first token, with a prompt of 32 tokens; `token` that of each further one, with the
key-value cache. The adapter is a LoRA of rank 16 on every projection.

`agreement` is the share of 256 positions of held-out text at which bfloat16 kernels and exact
products have the same likeliest token, when the model reads one token at a time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from measuring import SMOLLM2, machine_line, ratio, write_result
from qwlora import quantize_
from qwlora.formats.model_source import load_model, load_tokenizer
from qwlora.nn.few_row_kernels import use_few_row_kernels_

PROMPT_TOKENS, RANK = 32, 16


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def seconds_of(model: Any, ids: Tensor, tokens: int) -> tuple[float, float]:
    """Processor seconds to the first token, and of each further one."""
    spent = []
    for count in (1, tokens + 1):
        began = time.thread_time()
        with torch.inference_mode():
            length = {"min_new_tokens": count, "max_new_tokens": count, "pad_token_id": 0}
            mask = torch.ones_like(ids)
            found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **length)
        spent.append(time.thread_time() - began)
        assert found.shape[1] == ids.shape[1] + count
    return spent[0], (spent[1] - spent[0]) / tokens


@torch.inference_mode()
def likeliest(model: Any, ids: Tensor) -> Tensor:
    """The likeliest next token at each position, read one token at a time."""
    cache, found = None, []
    for token in ids.split(1, dim=1):
        output = model(token, cache=cache, use_cache=True)
        cache = output.cache
        found.append(output.logits[0, -1].argmax())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    floats: Any = load_model(SMOLLM2)
    if arguments.layers:
        floats.model.layers = floats.model.layers[: arguments.layers]
        floats.config.num_hidden_layers = arguments.layers
    tokenizer = load_tokenizer(SMOLLM2)
    text = tokenizer(topics["lambda"] + topics["class"] + topics["try"])["input_ids"]
    held_out = torch.tensor([text[:256]])
    packed = copy.deepcopy(floats)
    quantize_(packed, "w4-block64", "rtn")  # blocks of 32 are those of the file
    with_kernels = copy.deepcopy(packed)
    ways = {
        "float": floats,
        "base, exact": packed,
        "base, kernels": with_kernels,
        "base and adapter, exact": adapted(copy.deepcopy(packed)),
        "base and adapter, kernels": adapted(copy.deepcopy(packed)),
    }
    layers = use_few_row_kernels_(with_kernels)
    use_few_row_kernels_(ways["base and adapter, kernels"])
    first: dict[str, list[float]] = {name: [] for name in ways}
    token: dict[str, list[float]] = {name: [] for name in ways}
    ids = held_out[:, :PROMPT_TOKENS]
    for turn in range(arguments.rounds + 1):
        for name, model in ways.items():
            one, more = seconds_of(model, ids, arguments.tokens)
            if turn:  # the first round warms up
                first[name].append(one)
                token[name].append(more)
    rows = [
        {
            "way": name,
            "first_seconds": round(statistics.median(first[name]), 3),
            "first_ratio": ratio(first, name, "float"),
            "token_seconds": round(statistics.median(token[name]), 4),
            "tokens_per_second": round(1 / statistics.median(token[name]), 2),
            "token_ratio": ratio(token, name, "float"),
        }
        for name in ways
    ]
    same = (likeliest(packed, held_out) == likeliest(with_kernels, held_out)).float().mean()
    for row in rows:
        print("  ".join(f"{value!s:>26}" for value in row.values()))
    print(f"same likeliest token with kernels: {float(same):.4f}; {layers} layers")
    if not arguments.layers:
        content = {
            "machine": machine_line(),
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": arguments.tokens,
            "rounds": arguments.rounds,
            "layers_with_kernels": layers,
            "agreement": round(float(same), 4),
            "rows": rows,
        }
        write_result("generate", content)


if __name__ == "__main__":
    main()
