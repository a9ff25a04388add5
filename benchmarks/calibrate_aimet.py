"""aimet-torch's side of `calibrate.py`, which runs it.

    python calibrate_aimet.py FOLDER ROUNDS       with aimet-torch and transformers 4.49

Reads the float model, the adapter and the batch from FOLDER, and prints rows as one line of JSON.
The adapter's operators are modules, so AIMET quantizes them. In the rest of the model it quantizes
the modules, as for any user of AIMET: matrix products of attention, softmax and rotary embeddings
are not among them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from aimet_torch.nn import QuantizationMixin
from aimet_torch.quantsim import QuantizationSimModel
from safetensors.torch import load_file
from torch import nn

from aimet.llama import ForwardLogits, adapt_, llama  # the tests' own, see calibrate.py
from turns import make_row, peak_of, seconds_of_turns


def load(folder: Path) -> nn.Module:
    config, weights = (
        json.loads((folder / "config.json").read_text()),
        load_file(folder / "float.safetensors"),
    )
    model = llama(
        config["model"], weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    )
    adapt_(model, load_file(folder / "adapter.safetensors"), config["scaling"])
    return ForwardLogits(model).eval()


def main() -> None:
    folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    inputs = tuple(
        load_file(folder / "batch.safetensors")[name] for name in ("input_ids", "attention_mask")
    )
    parts: dict[str, Any] = {"plain": load(folder)}
    began = time.thread_time()
    parts["simulation"] = QuantizationSimModel(
        load(folder), inputs, default_output_bw=16, default_param_bw=4, in_place=True
    )
    made_seconds = time.thread_time() - began
    passes: list[float] = []

    def observe(model: nn.Module) -> None:
        began = time.thread_time()
        model(*inputs)
        passes.append(time.thread_time() - began)

    def calibrate(simulation: QuantizationSimModel) -> None:
        simulation.compute_encodings(observe)

    def run(model: Any) -> None:
        (model.model if isinstance(model, QuantizationSimModel) else model)(*inputs)

    calibrate(parts["simulation"])
    ways = {
        "plain": ("plain", run),
        "simulate": ("simulation", run),
        "calibrate": ("simulation", calibrate),
    }
    peaks = {way: peak_of(parts, part, use) for way, (part, use) in ways.items()}
    passes.clear()
    timed = seconds_of_turns(
        {way: lambda part=part, use=use: use(parts[part]) for way, (part, use) in ways.items()},
        rounds,
    )
    timed["observe"] = passes[1:]
    modules = [m for m in parts["simulation"].model.modules() if isinstance(m, QuantizationMixin)]
    quantizers = sum(
        q is not None for m in modules for q in (*m.input_quantizers, *m.output_quantizers)
    )
    rows = [make_row("aimet-torch", way, timed, peaks[way]) for way in ways]
    observed = make_row("aimet-torch", "observe", timed, {})
    rows.append(
        {
            **observed,
            "what": "the forward pass within calibrate",
            "quantizers": quantizers,
            "simulation_seconds": round(made_seconds, 1),
        }
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
