"""What calibration and simulation cost over the plain forward: SmolLM2-135M, packed at 4 bits, LoRA
of rank 16 on every projection, 1 x 512 tokens, one thread.

    python benchmarks/calibrate.py     prints a table and writes benchmarks/results/calibrate.json
    python benchmarks/calibrate.py --layers 2 --rounds 1    a smoke test on the first layers; writes
                                                            nothing

`plain` is the captured graph without quantizers. The ways take turns in one process and a ratio is
the median of the ratios of the rounds, in processor seconds of the one thread, as are all other
seconds. There are two kinds of calibration pass: min-max needs the ends of each batch, the other
estimators count all values, too. What an estimator does once, after all passes, is its `freeze_seconds`.
Peaks are of processes of their own (`measuring.py`). AIMET's phases are in `aimet.py`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from measuring import (
    SMOLLM2,
    machine_line,
    peak_of,
    ratio,
    seconds_of_turns,
    write_result,
)
from qwlora import Schemes, Simulation, quantize_, simulate
from qwlora.formats.model_source import load_model

TOKENS, RANK, SCALING = 512, 16, 2.0
ESTIMATORS = {
    "ends": ("min-max",),
    "histogram": ("percentile", "squared-error", "sqnr"),
}
LIMITS = {"observe ends": 1.12, "observe a histogram": 1.3, "simulate": 1.3}
ONCE_SECONDS, CAPTURE_SECONDS = 1.0, 60.0


def measure_ours(
    model: nn.Module, inputs: dict[str, Tensor], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ours, and what is said once."""
    tensors = tuple(inputs.values())
    parts: dict[str, Any] = {}
    capture_seconds = []
    for kind, observer in (("ends", "min-max"), ("histogram", "sqnr")):
        began = time.thread_time()
        parts[kind] = simulate(model, inputs, Schemes(observer=observer))
        capture_seconds.append(round(time.thread_time() - began, 1))
        parts[kind].calibrate([inputs])
    parts["plain"] = parts["ends"].graph().program.module(check_guards=False)
    ways: dict[str, tuple[str, Callable[[Any], object]]] = {
        "plain": ("plain", lambda part: part(*tensors)),
        "simulate": ("ends", lambda part: part(*tensors)),
        "observe ends": ("ends", lambda part: part.observe([inputs])),
        "observe a histogram": ("histogram", lambda part: part.observe([inputs])),
    }
    peaks = {way: peak_of(parts, kind, run) for way, (kind, run) in ways.items()}
    timed = seconds_of_turns(
        {way: partial(run, parts[kind]) for way, (kind, run) in ways.items()},
        rounds,
        {"simulate": parts["ends"].freeze},
    )
    rows = [
        {
            "tool": "qwlora",
            "way": way,
            "ratio": ratio(timed, way, "plain"),
            "seconds": [round(seconds, 3) for seconds in timed[way]],
            **peaks[way],
            **({"limit": LIMITS[way]} if way in LIMITS else {}),
        }
        for way in ways
    ]
    said = {
        "quantizers": len(parts["ends"].quantizers),
        "capture_to_simulation_seconds": capture_seconds,
        "freeze_seconds": {
            o: freeze_seconds(parts[kind], o)
            for kind, observers in ESTIMATORS.items()
            for o in observers
        },
    }
    return rows, said


def freeze_seconds(simulation: Simulation, observer: str) -> float:
    """Seconds of fixing every encoding by this estimator, from what was observed."""
    for quantizer in simulation.quantizers.values():
        quantizer.estimator, quantizer.encoding = replace(quantizer.estimator, name=observer), None
    began = time.thread_time()
    simulation.freeze()
    return round(time.thread_time() - began, 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, help="only the first layers of the model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(SMOLLM2)
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, TOKENS), generator=generator)
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules="all-linear", init_lora_weights=False
    )
    peft = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    quantize_(peft, "w4-block32", "rtn")
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        rows, said = measure_ours(peft, inputs, options.rounds)
    held = {
        f"{row['way']} <= {row['limit']}": row["ratio"] <= row["limit"]
        for row in rows
        if "limit" in row
    }
    held[f"freeze <= {ONCE_SECONDS} s"] = max(said["freeze_seconds"].values()) <= ONCE_SECONDS
    longest = max(said["capture_to_simulation_seconds"])
    held[f"capture to simulation < {CAPTURE_SECONDS} s"] = longest < CAPTURE_SECONDS
    result = {"machine": machine_line(), "tokens": TOKENS, **said, "held": held, "rows": rows}
    print(json.dumps(result, indent=1))
    if not options.layers:
        write_result("calibrate", result)


if __name__ == "__main__":
    main()
