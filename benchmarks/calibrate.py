"""What calibration and simulation cost over the plain forward: SmolLM2-135M, packed at 4 bits, LoRA of rank 16 on every projection, 1 x 512 tokens, one thread.

    python benchmarks/calibrate.py --aimet PYTHON     prints a table and writes benchmarks/results/calibrate.json
    python benchmarks/calibrate.py --layers 2 --rounds 1      a smoke test on the first layers; writes nothing

`plain` is the captured graph without quantizers. The ways take turns in one process and a ratio is the median of the ratios of the rounds, in processor
seconds of the one thread, as are all other seconds. There are two kinds of calibration pass: min-max needs the ends of each batch, the other estimators a
sample too. What an estimator does once, after all passes, is its `freeze_seconds`. Peaks are of processes of their own (`measuring.py`).

PYTHON is that of an environment with aimet-torch and transformers 4.49 (`make test-aimet` makes one, .nox/aimet): its `QuantizationSimModel` calibrates and
simulates the same float model with the same adapter on the same batch, over its own plain forward. Without it, the rows of an earlier run stay; if there are
none, the result says so.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from measuring import (
    SMOLLM2,
    earlier_result,
    machine_line,
    make_row,
    peak_of,
    run_python,
    seconds_of_turns,
    write_result,
)
from qwlora import Schemes, Simulation, quantize_, simulate
from qwlora.formats.model_source import load_model
from qwlora.system.parameter_names import canonical_name, is_adapter_name

TOKENS, RANK, SCALING = 512, 16, 2.0
CONFIG = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size max_position_embeddings rms_norm_eps".split()  # noqa: SIM905
ESTIMATORS = {
    "ends": ("min-max",),
    "sample": ("percentile", "squared-error", "sqnr"),
}
LIMITS = {"observe ends": 1.12, "observe a sample": 1.2, "simulate": 1.3}
ONCE_SECONDS, CAPTURE_SECONDS = 1.0, 60.0


def float_model(layers: int | None) -> nn.Module:
    """SmolLM2 as floats, or its first layers."""
    model = load_model(SMOLLM2)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return model


def adapted(model: nn.Module) -> nn.Module:
    """A LoRA that is not zero on every projection."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules="all-linear", init_lora_weights=False
    )
    peft: nn.Module = get_peft_model(model, config, autocast_adapter_dtype=False)
    return peft.eval()


def batch(vocabulary: int) -> dict[str, Tensor]:
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def write_for_aimet(
    model: nn.Module, peft: nn.Module, inputs: dict[str, Tensor], folder: Path
) -> None:
    """The float model, the adapter and the batch, for an environment in which none of ours runs."""
    config = {name: getattr(model.config, name) for name in CONFIG} | {
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps({"model": config, "scaling": SCALING}))
    tensors = {
        canonical_name(name.replace(".base_layer.", ".")): p.detach()
        for name, p in peft.named_parameters()
    }
    save_file(
        {name: t for name, t in tensors.items() if not is_adapter_name(name)},
        folder / "float.safetensors",
    )
    save_file(
        {name: t for name, t in tensors.items() if is_adapter_name(name)},
        folder / "adapter.safetensors",
    )
    save_file(inputs, folder / "batch.safetensors")


def measure_ours(
    model: nn.Module, inputs: dict[str, Tensor], rounds: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of ours, and what is said once."""
    tensors = tuple(inputs.values())
    parts: dict[str, Any] = {}
    capture_seconds = []
    for kind, observer in (("ends", "min-max"), ("sample", "sqnr")):
        began = time.thread_time()
        parts[kind] = simulate(model, inputs, Schemes(observer=observer))
        capture_seconds.append(round(time.thread_time() - began, 1))
        parts[kind].calibrate([inputs])
    parts["plain"] = parts["ends"].graph().program.module(check_guards=False)
    ways: dict[str, tuple[str, Callable[[Any], object]]] = {
        "plain": ("plain", lambda part: part(*tensors)),
        "simulate": ("ends", lambda part: part(*tensors)),
        "observe ends": ("ends", lambda part: part.observe([inputs])),
        "observe a sample": ("sample", lambda part: part.observe([inputs])),
    }
    peaks = {way: peak_of(parts, kind, run) for way, (kind, run) in ways.items()}
    timed = seconds_of_turns(
        {way: partial(run, parts[kind]) for way, (kind, run) in ways.items()},
        rounds,
        {"simulate": parts["ends"].freeze},
    )
    rows = [
        make_row("qwlora", way, timed, peaks[way])
        | ({"limit": LIMITS[way]} if way in LIMITS else {})
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
    parser.add_argument(
        "--aimet",
        metavar="PYTHON",
        help="the interpreter of an environment with aimet-torch and transformers 4.49",
    )
    parser.add_argument(
        "--only-aimet",
        action="store_true",
        help="measure its rows alone, and keep ours from the file",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=11,
        help="a sample is thinned more often in the first few batches than later",
    )
    parser.add_argument("--layers", type=int, help="only the first layers of the model")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = float_model(options.layers)
    inputs = batch(model.config.vocab_size)
    peft = adapted(model)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        write_for_aimet(model, peft, inputs, Path(name))
        result = {"rows": []} | ({} if options.layers else earlier_result("calibrate"))
        theirs = [row for row in result["rows"] if row["tool"] != "qwlora"]
        if not options.only_aimet:
            quantize_(peft, "w4-block32", "rtn")
            result = summary(*measure_ours(peft, inputs, options.rounds))
        if options.aimet:
            report(result, write=False)
            theirs = run_python(
                Path(__file__).with_name("aimet_theirs.py"),
                "calibrate",
                name,
                str(options.rounds),
                python=options.aimet,
            )
    result["aimet"] = (
        "the same float model, adapter and batch, over its own plain forward"
        if theirs
        else "left out: --aimet was not given"
    )
    result["rows"] = [row for row in result["rows"] if row["tool"] == "qwlora"] + theirs
    report(result, write=not options.layers)


def summary(rows: list[dict[str, Any]], said: dict[str, Any]) -> dict[str, Any]:
    """What is written down, with the limits that were held."""
    held = {
        f"{row['way']} <= {row['limit']}": row["ratio"] <= row["limit"]
        for row in rows
        if "limit" in row
    }
    held[f"freeze <= {ONCE_SECONDS} s"] = max(said["freeze_seconds"].values()) <= ONCE_SECONDS
    held[f"capture to simulation < {CAPTURE_SECONDS} s"] = (
        max(said["capture_to_simulation_seconds"]) < CAPTURE_SECONDS
    )
    return {"machine": machine_line(), "tokens": TOKENS, **said, "held": held, "rows": rows}


def report(result: dict[str, Any], write: bool) -> None:
    """Print, and write down unless it was a smoke test."""
    for row in result["rows"]:
        print(row)
    print({name: value for name, value in result.items() if name != "rows"}, flush=True)
    if write:
        write_result("calibrate", result)


if __name__ == "__main__":
    main()
