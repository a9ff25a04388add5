"""A training step on packed weights against plain PEFT: SmolLM2-135M, LoRA of rank 16 on every projection.

    python benchmarks/train.py time                    writes benchmarks/results/train_step.json
    python benchmarks/train.py time --only w3          some groups alone; the others in the file stay
    python benchmarks/train.py time --rounds 1         a smoke test; writes nothing
    python benchmarks/train.py memory                  writes benchmarks/results/train_memory.json
    python benchmarks/train.py memory --only plain ours --steps 2 --rounds 1

time: forward and backward, also of bitsandbytes' NF4 (extra `benchmarks`; without it its row is left out). Candidates are measured in groups, each with plain
float32 PEFT in it: [plain, a bitwidth in float32, the same in bfloat16] for each bitwidth,
[plain, plain bfloat16, NF4], and [plain, 4 bits, the same with a mergeable adapter], both as the
train stage runs them (`fused_lora`). Within a group they take turns
step by step; `ratio` is the median over the turns of that turn's two times, `ratios` the smallest and the largest. No more than one group is in memory, beside
the float model. One thread is timed by the processor's clock, which does not run while others have the processor, more by the wall's. `resident` is the bytes
of the packed layers over those of the same weights in float32.

memory: whole steps of 4 x 512 tokens with AdamW; the base has 4 bits. Each way trains in a process of its own, from a checkpoint on disk. `peak` is the largest
resident size of the whole process during the steps (VmHWM, counted anew after loading), Python, torch and transformers included; `imported` is the resident
size before anything is loaded, so the difference is what model and step cost. `ours` trains as the train stage does (`adapter/train.py`), `plain` as anybody
runs it. The embedding, which is the head too, is float32, or with `head int8` of 8 bits per block of 32, as in the model's own file. `ratio` is of whole peaks;
`ratio_above_imports` of the differences; both, and `time_ratio`, are over `plain`. `ratio_to_peer` and `time_ratio_to_peer` are over `peer`, plain PEFT with the
same checkpointing and precision. Seconds are the median of the steps after the first, by the processor's clock; the ratio
of times is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import math
import statistics
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from measuring import (
    SMOLLM2,
    earlier_result,
    machine_line,
    ratio,
    run_python,
    seconds_of_turns,
    write_result,
)
from qwlora.system.machine import peak_rss_bytes, reset_peak_rss

SCHEMES = {2: "w2-block32-asymmetric", 3: "w3-block32", 4: "w4-block32", 8: "w8-block32"}
SHAPES = ((1, 256), (4, 512))
LIMITS = {256: 1.2, 2048: 1.05}
HAS_NF4 = importlib.util.find_spec("bitsandbytes") is not None
IS_ONE_THREAD = torch.get_num_threads() == 1
BATCH, TOKENS = 4, 512
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-checkpointing": {"checkpointing": True},
    "plain-bf16-checkpointing": {"checkpointing": True, "half": True},
    "ours": {"base": "w4"},
    "ours, mergeable": {"base": "w4", "mergeable": True},
    "ours-checkpointing": {"base": "w4", "checkpointing": True},
    "ours-bf16-checkpointing": {"base": "w4", "checkpointing": True, "half": True},
    "ours, head int8": {"base": "w4-head8"},
    "ours-checkpointing, head int8": {"base": "w4-head8", "checkpointing": True},
    "ours-bf16-checkpointing, head int8": {"base": "w4-head8", "checkpointing": True, "half": True},
}
GOALS = {
    "ours": (0.78, 1.02),
    "ours-checkpointing": (0.25, 1.2),
    "ours-bf16-checkpointing": (0.17, 0.9),
}


def adapted(base: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=16, target_modules="all-linear")
    return get_peft_model(base, config, autocast_adapter_dtype=False).train()


def packed(base: nn.Module, bits: int) -> tuple[nn.Module, float]:
    from qwlora.nn import packed_weights
    from qwlora.quantize.quantize_model import quantize_

    base = copy.deepcopy(base)
    quantize_(base, SCHEMES[bits], solver="search")  # whose block scales float16 holds
    layers = [layer for layer in packed_weights(base).values() if not layer.is_tied]
    floats = sum(4 * math.prod(layer.tensor.shape) for layer in layers)
    return base, sum(layer.tensor.nbytes for layer in layers) / floats


def nf4(base: nn.Module) -> tuple[nn.Module, float]:
    import bitsandbytes as bnb

    base = copy.deepcopy(base)
    held = floats = 0
    for path, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and path != "lm_head":
            sizes, nf4 = (module.in_features, module.out_features), {"quant_type": "nf4"}
            layer = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, **nf4)
            layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **nf4)
            base.set_submodule(path, layer.to("cpu"))
            held += layer.weight.nbytes + layer.weight.quant_state.absmax.nbytes
            floats += 4 * module.weight.numel()
    base.is_loaded_in_4bit = True  # what transformers sets, and PEFT asks for
    return base, held / floats


def candidates_of(base: nn.Module, group: str) -> dict[str, tuple[nn.Module, float]]:
    """The candidates of a group, and the share of float32's bytes that each holds."""
    found = {"plain float32": (adapted(copy.deepcopy(base)), 1.0)}
    if group == "others":
        found["plain bfloat16"] = adapted(copy.deepcopy(base).to(torch.bfloat16)), 0.5
        if HAS_NF4:
            frozen, resident = nf4(base)
            found["bitsandbytes NF4"] = adapted(frozen), resident
        return found
    if group == "mergeable":
        from qwlora.adapter.mergeable import mergeable_

        frozen, resident = packed(base, 4)
        found[f"{SCHEMES[4]} float32"] = adapted(copy.deepcopy(frozen)), resident
        found["mergeable"] = adapted(frozen), resident + 4 / 32  # and 4 bits of what was rounded
        weights = dict(base.named_parameters())
        mergeable_(found["mergeable"][0], weight=lambda path: weights[f"{path}.weight"].detach())
        return found
    scheme = SCHEMES[int(group[1:])]
    frozen, resident = packed(base, int(group[1:]))
    found[f"{scheme} bfloat16"] = adapted(copy.deepcopy(frozen).to(torch.bfloat16)), resident
    found[f"{scheme} float32"] = adapted(frozen), resident
    return found


def step(model: nn.Module, ids: torch.Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def time_group(base: nn.Module, group: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of one group."""
    from qwlora.adapter.training_step import fused_lora

    rows, candidates, fused = [], candidates_of(base, group), contextlib.ExitStack()
    for model, _ in candidates.values() if group == "mergeable" else ():
        fused.enter_context(fused_lora(model))
    for shape in SHAPES:
        ids = torch.randint(0, 49152, shape, generator=torch.Generator().manual_seed(0))
        ways = {name: partial(step, model, ids) for name, (model, _) in candidates.items()}
        cleared = {name: model.zero_grad for name, (model, _) in candidates.items()}
        clock = time.process_time if IS_ONE_THREAD else time.perf_counter
        seconds = seconds_of_turns(ways, rounds, cleared, clock)
        for name, (_, resident) in candidates.items():
            turns = zip(seconds[name], seconds["plain float32"], strict=True)
            ratios = [taken / plain for taken, plain in turns]
            row = {
                "group": group,
                "candidate": name,
                "tokens": shape[0] * shape[1],
                "seconds": round(statistics.median(seconds[name]), 4),
                "resident": round(resident, 4),
                "ratio": round(statistics.median(ratios), 3),
                "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
            }
            if name.endswith("bfloat16"):
                row["to_its_float32"] = ratio(seconds, name, name.replace("bfloat16", "float32"))
            rows.append(row)
            print(row, flush=True)
    return rows


def goals(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Each goal, and whether it holds at all bitwidths that were measured."""
    ours = [row for row in rows if row["candidate"].startswith("w")]
    floats = [row for row in ours if row["candidate"].endswith(" float32")]
    held = {
        f"step at {tokens} tokens <= {limit}": all(
            row["ratio"] <= limit for row in floats if row["tokens"] == tokens
        )
        for tokens, limit in LIMITS.items()
    }
    held["resident <= (bits + 0.6) / 32"] = all(
        row["resident"] <= (int(row["candidate"][1]) + 0.6) / 32 for row in floats
    )
    halves = [row["to_its_float32"] for row in ours if "to_its_float32" in row]
    return held | {"bfloat16 faster than float32": all(half < 1 for half in halves)}


def compare_times(groups: list[str], rounds: int) -> None:
    from qwlora.formats.model_source import load_model

    base = load_model(SMOLLM2)
    rows = [row for group in groups for row in time_group(base, group, rounds)]
    is_smoke_test = rounds == 1
    if not is_smoke_test:
        earlier = earlier_result("train_step").get("rows", [])
        rows += [row for row in earlier if row["group"] not in groups]
    held = goals(rows)
    print(held)
    if is_smoke_test:
        return
    theirs = f"bitsandbytes {version('bitsandbytes')}" if HAS_NF4 else "bitsandbytes not installed"
    clock = "processor" if IS_ONE_THREAD else "wall"
    machine = f"{machine_line()}, {theirs}"
    write_result("train_step", {"machine": machine, "clock": clock, "held": held, "rows": rows})


def prepare(folder: Path) -> None:
    """The float checkpoint and the packed bases, once."""
    from qwlora.formats.base_folder import save_base
    from qwlora.formats.model_source import load_model, load_tokenizer
    from qwlora.grid.scheme import parse_scheme
    from qwlora.quantize.layer_rules import LayerRule
    from qwlora.quantize.quantize_model import quantize_

    model = load_model(SMOLLM2)
    # it was dequantized while loading, and is a float model like any other
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder / "float")
    for name, rules in (
        ("w4", []),
        ("w4-head8", [LayerRule("lm_head", parse_scheme("w8-block32"))]),
    ):
        base = copy.deepcopy(model)
        quantize_(base, "w4-block32", "rtn", rules=rules)
        (folder / name).mkdir()
        save_base(base, folder / name, load_tokenizer(SMOLLM2), source=SMOLLM2)


def measure(
    folder: Path,
    steps: int,
    base: str = "",
    checkpointing: bool = False,
    half: bool = False,
    mergeable: bool = False,
) -> dict[str, Any]:
    """One way, in this process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qwlora.adapter.mergeable import mergeable_
    from qwlora.adapter.training_step import memory_saving
    from qwlora.formats.base_folder import load_base

    torch.set_num_threads(2)
    reset_peak_rss()
    imported = peak_rss_bytes()
    inner: Any = (
        load_base(folder / base)
        if base
        else AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32)
    )
    inner.config.use_cache = False
    model = get_peft_model(inner, LoraConfig(r=16, target_modules="all-linear")).train()
    if mergeable:
        floats = AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32)
        mergeable_(model, weight=lambda path: floats.get_submodule(path).weight.detach())
        del floats
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, inner.config.vocab_size, (BATCH, TOKENS), generator=generator)
    reset_peak_rss()
    loaded, seconds, losses = peak_rss_bytes(), [], []
    with memory_saving(model, half) if base else contextlib.nullcontext():
        for _ in range(steps):
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            seconds.append(time.process_time() - began)
    return {
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "peak_bytes": peak_rss_bytes(),
        "seconds": statistics.median(seconds[1:] or seconds),
        "losses": losses,
    }


def compare_memory(names: list[str], steps: int, rounds: int) -> None:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        run_python(__file__, "prepare", "--folder", folder)
        for name in names * rounds:
            way = ("--way", name, "--folder", folder, "--steps", str(steps))
            runs[name].append(run_python(__file__, "measure", *way))
    rows = []
    for name, found in runs.items():
        peak = max(r["peak_bytes"] for r in found)
        above = max(r["peak_bytes"] - r["imported_bytes"] for r in found)
        row = {"way": name, **found[0], "peak_bytes": peak}
        row["seconds"] = statistics.median(r["seconds"] for r in found)
        if plain := runs.get("plain"):
            times = {key: [r["seconds"] for r in runs[key]] for key in ("plain", name)}
            plain_above = max(r["peak_bytes"] - r["imported_bytes"] for r in plain)
            row["ratio"] = round(peak / max(r["peak_bytes"] for r in plain), 3)
            row["ratio_above_imports"] = round(above / plain_above, 3)
            row["time_ratio"] = ratio(times, name, "plain")
        peer = name.split(",")[0].replace("ours", "plain")
        if peer != name and (peers := runs.get(peer)):
            times = {key: [r["seconds"] for r in runs[key]] for key in (peer, name)}
            row["peer"] = peer
            row["ratio_to_peer"] = round(peak / max(r["peak_bytes"] for r in peers), 3)
            row["time_ratio_to_peer"] = ratio(times, name, peer)
        if goal := GOALS.get(name.removesuffix(", head int8")):
            row["goal"], row["time_goal"] = goal
        rows.append(row)
        print({k: v for k, v in row.items() if k != "losses"}, flush=True)
    machine = {"machine": machine_line(), "tokens": [BATCH, TOKENS]}
    write_result("train_memory", {**machine, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("time", "memory", "prepare", "measure"))
    groups = [*(f"w{bits}" for bits in SCHEMES), "others", "mergeable"]
    parser.add_argument("--only", nargs="*", choices=[*groups, *WAYS], help="groups, or ways")
    parser.add_argument("--rounds", type=int, help="turns of each candidate (7) or way (3)")
    parser.add_argument("--steps", type=int, default=3, help="of a way; the first is not timed")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    match options.what:
        case "time":
            compare_times(options.only or groups, options.rounds or 7)
        case "memory":
            compare_memory(options.only or list(WAYS), options.steps, options.rounds or 3)
        case "prepare":
            prepare(options.folder)
            print("null")
        case _:
            print(json.dumps(measure(options.folder, options.steps, **WAYS[options.way])))


if __name__ == "__main__":
    main()
