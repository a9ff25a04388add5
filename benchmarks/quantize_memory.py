"""Peak memory of quantizing a sharded checkpoint and of loading the result, for three sizes.

    python benchmarks/quantize_memory.py [SIZE ...]   prints a table; writes results/quantize_memory.json and results/quantize_memory.svg

Each checkpoint is a Llama of random bfloat16 weights, written layer by layer into a temporary folder (the largest needs 9 GB of disk). Quantizing (round
to nearest, 4 bits, blocks of 32) and loading (with one forward pass) each run in a process of their own; the figure is its VmHWM, which counts mapped
pages too. One thread.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

SCHEME = "w4-block32"
SIZES = {
    "0.3B": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
}
VOCABULARY = 32000
RESULTS = Path(__file__).parent / "results"
GIB = 2**30


def write_checkpoint(folder: Path, sizes: dict[str, int]) -> int:
    """A folder as `save_pretrained` makes it, one shard for each layer; returns the count of weights."""
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        **sizes,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, []))).save_pretrained(
        folder
    )
    with init_empty_weights(include_buffers=False):
        shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).named_parameters()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(".".join(name.split(".")[:3]), []).append(name)
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for i, names in enumerate(shards.values()):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {
            n: torch.empty(shapes[n], dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            for n in names
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def quantize(source: Path, out: Path) -> None:
    from qwlora.formats.huggingface.huggingface_folder import FloatCheckpoint
    from qwlora.formats.model_source import load_tokenizer
    from qwlora.quantize.quantize_checkpoint import quantize_checkpoint

    tokenizer = load_tokenizer(str(source))
    out.mkdir()
    quantize_checkpoint(FloatCheckpoint(source), tokenizer, out, str(source), SCHEME, "rtn")


def load(out: Path) -> None:
    import torch

    from qwlora.formats.base_folder import load_base

    model = load_base(out)
    with torch.no_grad():
        assert bool(model(torch.arange(8)[None]).logits.isfinite().all())


def nothing() -> None:
    """What a process weighs that has imported everything and done nothing."""
    for module in ("readers.folder", "source", "storage", "stream"):
        importlib.import_module(f"qwlora.quantize.{module}")


def measured(*arguments: str) -> dict[str, float]:
    """Run this file in a process of its own."""
    began = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return {
        "seconds": round(time.perf_counter() - began, 1),
        **json.loads(done.stdout.splitlines()[-1]),
    }


def peak_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return (
        int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        * 1024
    )


def main(chosen: Sequence[str] = tuple(SIZES)) -> None:
    from machine import machine_line

    idle = measured("nothing")["peak_rss_bytes"]
    rows = []
    for name, sizes in ((n, SIZES[n]) for n in chosen):
        with tempfile.TemporaryDirectory() as scratch:
            source, out = Path(scratch) / "float", Path(scratch) / "base"
            source.mkdir()
            weights = write_checkpoint(source, sizes)
            steps = {
                step: measured(step, *paths)
                for step, paths in (("quantize", (str(source), str(out))), ("load", (str(out),)))
            }
            base_bytes = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        row = {
            "size": name,
            "weights": weights,
            "float32_bytes": 4 * weights,
            "base_bytes": base_bytes,
        }
        row |= {
            f"{step}_{key}": value for step, found in steps.items() for key, value in found.items()
        }
        rows.append(row)
        print(
            f"{name}: {weights / 1e9:.2f}e9 weights, float32 {4 * weights / GIB:.2f} GiB, base {base_bytes / GIB:.2f} GiB; peak RSS: quantize "
            f"{row['quantize_peak_rss_bytes'] / GIB:.2f} GiB in {row['quantize_seconds']} s, load and forward {row['load_peak_rss_bytes'] / GIB:.2f} GiB "
            f"in {row['load_seconds']} s",
            flush=True,
        )
    result = {
        "machine": machine_line(),
        "scheme": SCHEME,
        "idle_peak_rss_bytes": idle,
        "rows": rows,
    }
    (RESULTS / "quantize_memory.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "quantize_memory.svg").write_text(plot(rows, idle))


def plot(rows: list[dict[str, float]], idle: float) -> str:
    """Peak RSS against the float32 size, both axes in GiB."""
    width, height, left, bottom = 520, 360, 60, 310
    most = max(row["float32_bytes"] for row in rows) / GIB * 1.05
    series = {
        "float32 weights": ("#999", lambda r: r["float32_bytes"]),
        "quantize": ("#c33", lambda r: r["quantize_peak_rss_bytes"]),
        "load and forward": ("#36c", lambda r: r["load_peak_rss_bytes"]),
        "idle process": ("#393", lambda r: idle),
    }

    def at(x: float, y: float) -> str:
        return (
            f"{left + x / most * (width - left - 20):.1f},{bottom - y / most * (bottom - 30):.1f}"
        )

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    ]
    lines.append(
        f'<rect width="{width}" height="{height}" fill="#fff"/><path d="M{at(0, most)} L{at(0, 0)} L{at(most, 0)}" fill="none" stroke="#000"/>'
    )
    for tick in range(0, int(most) + 1, 2):
        x, y = at(tick, 0).split(",")[0], at(0, tick).split(",")[1]
        lines.append(
            f'<text x="{x}" y="{bottom + 16}" text-anchor="middle">{tick}</text><text x="{left - 8}" y="{y}" text-anchor="end">{tick}</text>'
        )
    lines.append(
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle">float32 weights, GiB</text><text x="8" y="18">peak RSS, GiB</text>'
    )
    for i, (label, (colour, value)) in enumerate(series.items()):
        points = [at(row["float32_bytes"] / GIB, value(row) / GIB) for row in rows]
        lines.append(
            f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        lines += [
            f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3" fill="{colour}"/>'
            for p in points
        ]
        lines.append(f'<text x="{left + 20}" y="{44 + 16 * i}" fill="{colour}">{label}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    if not sys.argv[1:] or sys.argv[1] in SIZES:
        main(sys.argv[1:] or tuple(SIZES))
    else:
        step, *paths = sys.argv[1:]
        {"nothing": nothing, "quantize": quantize, "load": load}[step](*map(Path, paths))
        print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}))
