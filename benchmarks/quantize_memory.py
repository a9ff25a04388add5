"""Peak memory of quantizing a sharded checkpoint and of loading the result, for three sizes.

    python benchmarks/quantize_memory.py [SIZE ...]   writes benchmarks/results/quantize_memory.json

Each checkpoint is a Llama of random bfloat16 weights, written layer by layer into a temporary folder (the largest needs 9 GB of disk). Quantizing (round
to nearest, 4 bits, blocks of 32) and loading (with one forward pass) each run in a process of their own; the figure is its VmHWM, which counts mapped
pages too. One thread.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import machine_line, run_python, write_result
from qwlora.system.machine import peak_rss_bytes

SCHEME = "w4-block32"
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
SIZES = {
    "0.3B": dict(zip(NAMES, (1024, 2816, 22, 16), strict=True)),
    "1B": dict(zip(NAMES, (2048, 5632, 22, 32), strict=True)),
    "3B": dict(zip(NAMES, (3072, 8192, 28, 24), strict=True)),
}
VOCABULARY = 32000
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
        num_key_value_heads=8,
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
    from qwlora.formats.huggingface.huggingface_folder import FolderCheckpoint
    from qwlora.formats.model_source import load_tokenizer
    from qwlora.quantize.quantize_model import quantize_checkpoint

    tokenizer = load_tokenizer(str(source))
    out.mkdir()
    quantize_checkpoint(FolderCheckpoint(source), tokenizer, out, str(source), SCHEME, "rtn")


def load(out: Path) -> None:
    import torch

    from qwlora.formats.base_folder import load_base

    model = load_base(out)
    with torch.no_grad():
        assert bool(model(torch.arange(8)[None]).logits.isfinite().all())


def nothing() -> None:
    """What a process weighs that has imported everything and done nothing."""
    for module in ("formats.huggingface.huggingface_folder", "quantize.quantize_model"):
        importlib.import_module(f"qwlora.{module}")


STEPS: dict[str, Callable[..., None]] = {"nothing": nothing, "quantize": quantize, "load": load}


def measured(step: str, *paths: Path) -> dict[str, float]:
    """Run a step in a process of its own."""
    began = time.perf_counter()
    found = run_python(__file__, "--step", step, *paths, TQDM_DISABLE="1")
    return {"seconds": round(time.perf_counter() - began, 1), **found}


def measure_size(name: str) -> dict[str, Any]:
    """The row of one size."""
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "float", Path(scratch) / "base"
        source.mkdir()
        weights = write_checkpoint(source, SIZES[name])
        steps = {"quantize": measured("quantize", source, out), "load": measured("load", out)}
        base_bytes = sum(p.stat().st_size for p in out.glob("*.safetensors"))
    row = {"size": name, "weights": weights, "float32_bytes": 4 * weights}
    row["base_bytes"] = base_bytes
    for step, found in steps.items():
        row |= {f"{step}_{key}": value for key, value in found.items()}
    shown = {key: f"{row[key] / GIB:.2f} GiB" for key in row if key.endswith("bytes")}
    print(f"{name}: {weights / 1e9:.2f}e9 weights, {shown}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, *paths = options.step
        STEPS[step](*map(Path, paths))
        print(json.dumps({"peak_rss_bytes": peak_rss_bytes()}))
        return
    idle = measured("nothing")["peak_rss_bytes"]
    rows = [measure_size(name) for name in options.sizes]
    result = {"machine": machine_line(), "scheme": SCHEME, "idle_peak_rss_bytes": idle}
    write_result("quantize_memory", {**result, "rows": rows})


if __name__ == "__main__":
    main()
