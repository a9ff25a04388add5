"""Generating text with SmolLM2-135M: the float model, a packed base with and without an adapter in
torch, and the files of targets gguf (llama.cpp) and genai (onnxruntime-genai) with the same
integers, exactly and with activations of 8 bits.

    pip install 'qwlora[genai,llamacpp]'
    python benchmarks/generate.py [--threads 2]    prints a table; writes results/generate-1.json
    python benchmarks/generate.py --rounds 1 --tokens 4 --layers 2    a smoke test; writes nothing

The ways take turns in one process. Nothing else may run: seconds are those of a clock. A ratio is
the median of the ratios of the rounds. `first` is the time to the first token, with a prompt of 32
tokens; `token` that of each further one, with the key-value cache. `speed` is tokens per second
over those of the float model, and over those of llama.cpp in the same arithmetic, with or without
the adapter, as the way has one. The adapter is a LoRA of rank 16 on every projection. In torch,
"head" is the output head in 8 bits; with it, "base and adapter" is what `qwlora generate` runs
without an export. The files of both targets have embeddings and heads of 8 bits. "exact" is
`model.onnx` of genai, which computes with float32 activations, and a float32 copy of llama.cpp's
file; "own builder" is what onnxruntime-genai makes of the float model at 4 bits in blocks of 32.

Each token needs all weights once, so `bytes` (of the weights as they are stored, the adapter in
float32) over the speed at which one thread reads memory is the least time of a token.
`share_of_bandwidth` is that time over the measured one.

`agreement` is the share of 256 positions of held-out text at which the base with kernels, reading
one token at a time, and exact products have the same likeliest token.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from measuring import SMOLLM2, machine_line, ratio, write_result
from qwlora import export, quantize_, save_adapter
from qwlora.adapter.training_step import fuse_lora_
from qwlora.formats.model_source import fetch, load_model, load_tokenizer
from qwlora.nn.few_row_kernels import use_few_row_kernels_
from qwlora.nn.packed_layer import PackedLayer
from qwlora.targets.registry import TARGETS

PROMPT_TOKENS, RANK = 32, 16
ADAPTED_BASE = "base and adapter"
DATA = {".gguf", ".data", ".onnx_adapter"}
KERNELS = "base, kernels", "base, kernels, head"
ADAPTED = "base and adapter, kernels", "base and adapter, kernels, head"
Generate = Callable[[int], int]  # new tokens -> how many there are


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def with_kernels(model: Any, head: bool) -> Any:
    use_few_row_kernels_(model, model.get_output_embeddings() if head else None)
    fuse_lora_(model)
    return model


def generating(model: Any, ids: Tensor, count: int) -> int:
    with torch.inference_mode():
        length = {"max_new_tokens": count, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **length)
    return found.shape[1] - ids.shape[1]


def exported_ways(
    packed: nn.Module, adapted: nn.Module, tokenizer: Any, ids: Tensor, folder: Path
) -> tuple[dict[str, Generate], dict[str, int]]:
    """Runtimes on exported files, and the bytes of these."""
    from qwlora.targets.onnx.genai import FAST_FILE, GenaiRuntime
    from qwlora.targets.onnx.onnx_model import MODEL_FILE

    save_adapter(adapted, folder / "own")
    runtimes, sizes = dict[str, Any](), dict[str, int]()
    for target, source in (("gguf", {"gguf_file": fetch(SMOLLM2).path}), ("genai", {})):
        made = folder / target
        export(packed, target, made, adapters={"a": folder / "own"}, tokenizer=tokenizer, **source)
        for own in (False, True):
            for exact in (True, False):
                name = (
                    f"{target}, {ADAPTED_BASE if own else 'base'}, {'exact' if exact else 'fast'}"
                )
                if target == "gguf":
                    backend = TARGETS[target].backend
                    opened = (backend.open if exact else backend.open_shipped)(
                        made / "base", "base"
                    )
                    opened.shipped = None  # no second model
                else:
                    opened = GenaiRuntime(made / "base", MODEL_FILE if exact else FAST_FILE)
                opened.use(made / "a" if own else None)
                runtimes[name] = opened
                parts = (made / "base", made / "a") if own else (made / "base",)
                files = [file for part in parts for file in part.glob("*.*") if file.suffix in DATA]
                sizes[name] = sum(file.stat().st_size for file in files)
    ways = {n: lambda count, r=r: len(r.decode(ids, count)) for n, r in runtimes.items()}
    return ways, sizes


def own_builder(floats: Any, tokenizer: Any, ids: Tensor, folder: Path) -> dict[str, Generate]:
    """What onnxruntime-genai's builder writes of the float model, for both accuracy levels."""
    from qwlora.targets.onnx.genai import GenaiRuntime
    from qwlora.targets.onnx.onnx_model import MODEL_FILE

    floats.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    ways = {}
    for name, level in (("exact", 1), ("fast", 4)):
        made = folder / f"builder-{level}"
        command = [
            sys.executable,
            "-m",
            "onnxruntime_genai.models.builder",
            "-p",
            "int4",
            "-e",
            "cpu",
        ]
        places = ["-i", folder / "float", "-o", made, "-c", folder / "cache"]
        options = ["int4_block_size=32", f"int4_accuracy_level={level}", "int4_is_symmetric=true"]
        head = ["int4_algo_config=rtn_last"]  # 8 bits, as ours
        options += head if level == 4 else ["nodes_to_exclude=/lm_head/MatMul"]
        subprocess.run([*command, *places, "--extra_options", *options], check=True, stdout=-3)
        runtime = GenaiRuntime(made, MODEL_FILE)
        ways[f"own builder, base, {name}"] = lambda n, r=runtime: len(r.decode(ids, n))
    return ways


def bytes_of(model: nn.Module, head: bool) -> int:
    """Bytes of the weights that a token needs: all but the rows of the embedding."""
    layers = {module for module in model.modules() if isinstance(module, PackedLayer)}
    floats = {id(p): p for p in model.parameters()}  # the embedding is the head
    output = next(p.numel() for n, p in model.named_parameters() if "embed_tokens" in n)
    rounded = 3 * output if head else 0
    return (
        sum(layer.tensor.nbytes for layer in layers)
        + sum(p.nbytes for p in floats.values())
        - rounded
    )


def read_bytes_per_second() -> float:
    """At which this thread reads memory: the best of some sums over 256 MB."""
    numbers, seconds = torch.ones(2**26), []
    for _ in range(5):
        began = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


def seconds_of(generate: Generate, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    spent = []
    for count in (1, tokens + 1):
        began = time.perf_counter()
        assert generate(count) == count
        spent.append(time.perf_counter() - began)
    return spent[0], (spent[1] - spent[0]) / tokens


@torch.inference_mode()
def likeliest(model: Any, ids: Tensor) -> Tensor:
    """The likeliest next token at each position, read one token at a time."""
    cache, found = None, []
    for token in ids.split(1, dim=1):
        output = model(token, cache=cache, use_cache=True)
        cache = output.cache
        found.append(output.logits[0, -1].argmax())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    floats: Any = load_model(SMOLLM2)
    floats.generation_config.eos_token_id = None  # no token ends a text
    if arguments.layers:
        floats.model.layers = floats.model.layers[: arguments.layers]
        floats.config.num_hidden_layers = arguments.layers
    tokenizer = load_tokenizer(SMOLLM2)
    text = tokenizer(topics["lambda"] + topics["class"] + topics["try"])["input_ids"]
    held_out = torch.tensor([text[:256]])
    ids = held_out[:, :PROMPT_TOKENS]
    packed = copy.deepcopy(floats)
    quantize_(packed.eval(), "w4-signed32", "search")  # the blocks of Q4_0, with float16 scales
    models = {
        "float": floats,
        "base, exact": packed,
        **{n: with_kernels(copy.deepcopy(packed), "head" in n) for n in KERNELS},
        "base and adapter, exact": adapted(copy.deepcopy(packed)),
        **{n: with_kernels(adapted(copy.deepcopy(packed)), "head" in n) for n in ADAPTED},
    }
    sizes = {name: bytes_of(model, "head" in name) for name, model in models.items()}
    ways: dict[str, Generate] = {n: partial(generating, m, ids) for n, m in models.items()}
    scratch = tempfile.TemporaryDirectory()
    folder, both = Path(scratch.name), models[f"{ADAPTED_BASE}, exact"]
    more, more_sizes = exported_ways(packed, both, tokenizer, ids, folder)
    own = own_builder(floats, tokenizer, ids, folder)
    sizes |= more_sizes | dict.fromkeys(own, more_sizes["genai, base, fast"])
    ways, reading = ways | more | own, read_bytes_per_second()
    first: dict[str, list[float]] = {name: [] for name in ways}
    token: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(arguments.rounds + 1):
        for name, way in ways.items():
            one, more = seconds_of(way, arguments.tokens)
            if turn:  # the first round warms up
                first[name].append(one)
                token[name].append(more)
    rows = []
    for name in ways:
        seconds = statistics.median(token[name])
        row = {
            "way": name,
            "first_seconds": round(statistics.median(first[name]), 3),
            "token_seconds": round(seconds, 4),
            "tokens_per_second": round(1 / seconds, 2),
            "speed": ratio(token, "float", name),
            "bytes": sizes[name],
            "share_of_bandwidth": round(sizes[name] / reading / seconds, 3),
        }
        what = ADAPTED_BASE if "adapter" in name else "base"
        how = "exact" if "exact" in name or name == "float" else "fast"
        row["speed_to_llama"] = ratio(token, f"gguf, {what}, {how}", name)
        rows.append(row)
        print("  ".join(f"{value!s:>31}" for value in row.values()))
    with torch.inference_mode():
        exact = packed(held_out).logits[0].argmax(-1)
    same = {
        name: round(float((exact == likeliest(models[name], held_out)).float().mean()), 4)
        for name in KERNELS
    }
    print(f"same likeliest token: {same}; memory is read at {reading / 1e9:.1f} GB/s")
    if arguments.layers:
        return
    content = {
        "machine": machine_line(),
        "threads": arguments.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "read_bytes_per_second": round(reading),
        "agreement": same,
        "rows": rows,
    }
    write_result(f"generate-{arguments.threads}", content)


if __name__ == "__main__":
    main()
