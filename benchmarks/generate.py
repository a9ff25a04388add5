"""Generating text with SmolLM2-135M or Gemma 3 270M: the float model, a packed base with and without
an adapter in torch, and the files of targets gguf (llama.cpp) and genai (onnxruntime-genai) with
the same integers, exactly and with activations of 8 bits.

    pip install 'qwlora[genai,llamacpp]'
    python benchmarks/generate.py [--threads 2] [--model gemma3]    prints a table, and writes
                                                                    results/generate-smollm2-1.json
    python benchmarks/generate.py --rounds 1 --tokens 4 --layers 2    a smoke test; writes nothing

The ways take turns in one process. Nothing else may run: seconds are those of a clock. A ratio is
the median of the ratios of the rounds. `first` is the time to the first token, with a prompt of 32
tokens; `token` that of each further one, with the key-value cache. `speed` is tokens per second
over those of the float model, and over those of llama.cpp in the same arithmetic, with or without
the adapter, as the way has one. The adapter is a LoRA of rank 16 on every projection. In torch,
"packed" is a base as it is loaded; "unpacked" has floats in its linear layers, and is what
`qwlora generate` runs without an export. The files of both targets have embeddings and heads of 8
bits. "exact" is `model.onnx` of genai, which computes with float32 activations, and a float32 copy
of llama.cpp's file; "own builder" is what onnxruntime-genai makes of the float model at 4 bits in
blocks of 32. `bytes` are those of the weights that a token needs, as they are stored.
"""

from __future__ import annotations

import argparse
import copy
import statistics
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

from measuring import SMOLLM2, built_by_genai, machine_line, ratio, write_result
from qwlora import export, quantize_, save_adapter
from qwlora.formats.model_source import fetch, load_model, load_tokenizer
from qwlora.nn.packed_layer import PackedLayer, unpack_linears_
from qwlora.targets.registry import TARGETS
from sources import gemma_file

PROMPT_TOKENS, RANK = 32, 16
ADAPTED_BASE = "base and adapter"
DATA = {".gguf", ".data", ".onnx_adapter"}
Generate = Callable[[int], int]  # new tokens -> how many there are


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


def unpacked(model: nn.Module) -> nn.Module:
    unpack_linears_(model)
    return model


def generating(model: Any, ids: Tensor, count: int) -> int:
    with torch.inference_mode():
        length = {"max_new_tokens": count, "pad_token_id": 0}
        mask = torch.ones_like(ids)
        found = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **length)
    return found.shape[1] - ids.shape[1]


def exported_ways(
    source: str, packed: nn.Module, adapted: nn.Module, tokenizer: Any, ids: Tensor, folder: Path
) -> tuple[dict[str, Generate], dict[str, int]]:
    """Runtimes on exported files, and the bytes of these."""
    from qwlora.targets.onnx.genai import FAST_FILE, GenaiRuntime
    from qwlora.targets.onnx.onnx_model import MODEL_FILE

    save_adapter(adapted, folder / "own")
    runtimes, sizes = dict[str, Any](), dict[str, int]()
    for target, given in (("gguf", {"gguf_file": fetch(source).path}), ("genai", {})):
        made = folder / target
        export(packed, target, made, adapters={"a": folder / "own"}, tokenizer=tokenizer, **given)
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


def own_builder(
    floats: Any, tokenizer: Any, ids: Tensor, folder: Path
) -> tuple[dict[str, Generate], dict[str, int]]:
    """What onnxruntime-genai's builder writes of the float model, for both accuracy levels."""
    from qwlora.targets.onnx.genai import GenaiRuntime
    from qwlora.targets.onnx.onnx_model import MODEL_FILE

    # The builder fails on a tied head of 8 bits.
    untied = copy.deepcopy(floats)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    untied.config.tie_word_embeddings = False
    untied.save_pretrained(folder / "float")
    tokenizer.save_pretrained(folder / "float")
    ways, sizes = dict[str, Generate](), dict[str, int]()
    for name, level in (("own builder, base, exact", 1), ("own builder, base, fast", 4)):
        made = built_by_genai(folder / "float", folder / f"builder-{level}", level)
        runtime = GenaiRuntime(made, MODEL_FILE)
        ways[name] = lambda n, r=runtime: len(r.decode(ids, n))
        sizes[name] = sum(file.stat().st_size for file in made.glob("*.data"))
    return ways, sizes


def bytes_of(model: nn.Module) -> int:
    layers = {module for module in model.modules() if isinstance(module, PackedLayer)}
    floats = {id(p): p for p in model.parameters()}  # the embedding is the head
    return sum(layer.tensor.nbytes for layer in layers) + sum(p.nbytes for p in floats.values())


def seconds_of(generate: Generate, tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and of each further one."""
    spent = []
    for count in (1, tokens + 1):
        began = time.perf_counter()
        assert generate(count) == count
        spent.append(time.perf_counter() - began)
    return spent[0], (spent[1] - spent[0]) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", choices=("smollm2", "gemma3"), default="smollm2")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    source = SMOLLM2 if arguments.model == "smollm2" else gemma_file()
    floats: Any = load_model(source)
    floats.generation_config.eos_token_id = None  # no token ends a text
    if arguments.layers:
        floats.model.layers = floats.model.layers[: arguments.layers]
        floats.config.num_hidden_layers = arguments.layers
        if kinds := getattr(floats.config, "layer_types", None):
            floats.config.layer_types = kinds[: arguments.layers]
    tokenizer = load_tokenizer(source)
    text = tokenizer(topics["lambda"] + topics["class"] + topics["try"])["input_ids"]
    held_out = torch.tensor([text[:256]])
    ids = held_out[:, :PROMPT_TOKENS]
    packed = copy.deepcopy(floats)
    quantize_(packed.eval(), "w4-signed32", "search")  # the blocks of Q4_0, with float16 scales
    both = adapted(copy.deepcopy(packed))
    models = {
        "float": floats,
        "torch, base, packed": packed,
        "torch, base, unpacked": unpacked(copy.deepcopy(packed)),
        f"torch, {ADAPTED_BASE}, packed": both,
        f"torch, {ADAPTED_BASE}, unpacked": unpacked(copy.deepcopy(both)),
    }
    sizes = {name: bytes_of(model) for name, model in models.items()}
    ways: dict[str, Generate] = {n: partial(generating, m, ids) for n, m in models.items()}
    scratch = tempfile.TemporaryDirectory()
    folder = Path(scratch.name)
    more, more_sizes = exported_ways(source, packed, both, tokenizer, ids, folder)
    own, own_sizes = own_builder(floats, tokenizer, ids, folder)
    sizes |= more_sizes | own_sizes
    ways |= more | own
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
        }
        what = ADAPTED_BASE if "adapter" in name else "base"
        how = "fast" if name.endswith("fast") else "exact"
        row["speed_to_llama"] = ratio(token, f"gguf, {what}, {how}", name)
        rows.append(row)
        print("  ".join(f"{value!s:>31}" for value in row.values()))
    if arguments.layers:
        return
    content = {
        "machine": machine_line(),
        "threads": arguments.threads,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "rows": rows,
    }
    write_result(f"generate-{arguments.model}-{arguments.threads}", content)


if __name__ == "__main__":
    main()
