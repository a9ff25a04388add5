"""Fuzz the readers of models and of our own bases: damaged files must end in a value or in the project's own error, in bounded time and memory.

    python benchmarks/fuzz_bases.py [SECONDS [SEED]]       600 seconds by default; writes benchmarks/results/fuzz_bases.json

Starts from a tiny llama as floats, GPTQ, AWQ, compressed-tensors, floats with AIMET encodings, GGUF, and a QWLoRA base, and breaks one of its files: JSON by
`fuzz_encodings.break_json` (config.json, base.json, encodings, and the header of safetensors files, whose length is set right again most of the time), anything
else as bytes: bits, cut ends, repeated pieces, runs of what is nan, infinite, negative or zero as a number. Whatever opens is read whole, and inspected.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import byte_tokenizer, tiny_model  # noqa: E402
from formats.gguf_models import metadata_of, stored_shapes, write_file  # noqa: E402 (tests lie beside, not in a package)
from formats.test_reader_awq import awq_model  # noqa: E402
from formats.test_reader_compressed_tensors import model_folder  # noqa: E402
from fuzz_encodings import break_bytes, break_json  # noqa: E402
from measuring import machine_line  # noqa: E402
from qwlora import load_base, quantize_, save_base  # noqa: E402
from qwlora.analysis.inspect_model import inspect_source  # noqa: E402
from qwlora.encodings import EncodingsFile, IntegerEncoding, write_encodings  # noqa: E402
from qwlora.errors import QwloraError  # noqa: E402
from qwlora.formats.assemble_model import load_precomputed  # noqa: E402
from qwlora.formats.open_checkpoint import open_checkpoint  # noqa: E402
from qwlora.grid.min_max import measure  # noqa: E402
from qwlora.grid.scheme import PerChannel, Scheme, parse_scheme  # noqa: E402
from qwlora.quantize.layer_rules import Rule  # noqa: E402

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
NUMBERS = (
    [struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0, 0.0, 1e-45)]
    + [struct.pack("<e", x) for x in (float("nan"), -0.5, 0.0)]
    + [b"\xff"]
)
ENCODINGS = "model.encodings"


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def make_sources(folder: Path) -> list[Path]:
    """One folder a kind."""
    floats, gptq, awq, compressed, aimet, gguf, base = (
        folder / name
        for name in ("float", "gptq", "awq", "compressed-tensors", "aimet", "gguf", "base")
    )
    model = llama()
    model.save_pretrained(floats)
    shutil.copytree(
        ROOT / "tests/formats/files/gptqmodel-llama",
        gptq,
        ignore=shutil.ignore_patterns("expected*"),
    )
    awq_model(awq)
    four = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    model_folder(
        compressed,
        {"group_0": {"targets": ["Linear"], "weights": four, "format": "pack-quantized"}},
        {"down_proj": ("pack-quantized", four)},
    )
    model.save_pretrained(aimet)
    entries = []
    for name, weight in model.state_dict().items():
        if weight.ndim == 2 and "embed" not in name:
            encoding = measure(weight, Scheme(4, True, PerChannel(0)))
            entries.append(
                IntegerEncoding(
                    name,
                    4,
                    encoding.scale.double().numpy(),
                    encoding.offset.long().numpy(),
                    True,
                    axis=0,
                )
            )
    write_encodings(EncodingsFile("2.0.0", entries), aimet / ENCODINGS)
    gguf.mkdir()
    config = LlamaConfig(**{**SIZES, "vocab_size": 16}, tie_word_embeddings=True)
    kinds = {
        "attn_q": "Q4_0",
        "attn_k": "Q8_0",
        "ffn_up": "Q4_1",
        "ffn_down": "Q5_0",
        "ffn_gate": "Q5_1",
    }
    write_file(
        gguf / "model.gguf",
        "llama",
        metadata_of("llama", config, "llama"),
        stored_shapes("llama", config),
        lambda name, _: next((kind for part, kind in kinds.items() if f".{part}." in name), "F32"),
        tokens=16,
    )
    packed = tiny_model("llama")
    rules = [
        Rule("*.q_proj", parse_scheme("w3-block32-asymmetric")),
        Rule("*.up_proj", parse_scheme("w4-lpbq16")),
        Rule("*.v_proj", None),
    ]
    quantize_(packed, "w4-block32", "rtn", rules=rules)
    base.mkdir()
    save_base(packed, byte_tokenizer(), base, "somewhere")
    return [floats, gptq, awq, compressed, aimet, gguf, base]


def broken(name: str, content: bytes, chance: random.Random) -> bytes:
    """`content` of a file of this name, damaged."""
    kind = chance.random()
    if name.endswith((".json", ".encodings")):
        return (
            break_bytes(content, chance)
            if kind < 0.2
            else json.dumps(break_json(json.loads(content), chance)).encode()
        )
    if name.endswith(".safetensors") and kind < 0.5:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(break_json(json.loads(content[8 : 8 + length]), chance)).encode()
        return (
            struct.pack(
                "<Q", len(header) if kind < 0.4 else chance.choice([length, 0, 2**40, 2**63])
            )
            + header
            + content[8 + length :]
        )
    if kind < 0.6:
        return break_bytes(content, chance)
    data = bytearray(content)
    for _ in range(chance.randint(1, 6)):
        number = chance.choice(NUMBERS)
        run = number * chance.randint(1, 40)
        at = chance.randrange(0, len(data), 2)
        data[at : at + len(run)] = run
    return bytes(data)


def use(folder: Path) -> str:
    """Open and read all of one source; the kind of ending."""
    gguf = folder / "model.gguf"
    path = gguf if gguf.exists() else folder
    ending = "read"
    for do in (lambda: inspect_source(str(path)), lambda: load(path)):
        try:
            do()
        except QwloraError:
            ending = "refused"
    return ending


def load(path: Path) -> None:
    if (path / "base.json").exists():
        load_base(path)
    else:
        load_precomputed(
            open_checkpoint(path, path / ENCODINGS if (path / ENCODINGS).exists() else None)
        )


def main(seconds: float = 600, seed: int = 0) -> None:
    chance = random.Random(seed)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    endings: dict[str, Counter[str]] = {}
    slowest = 0.0
    with tempfile.TemporaryDirectory() as name:
        sources = make_sources(Path(name) / "whole")
        for source in sources:
            assert use(source) == "read", f"{source.name}, whole, is refused"
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        while time.perf_counter() - began < seconds:
            source = chance.choice(sources)
            copy = Path(name) / source.name
            shutil.copytree(source, copy, dirs_exist_ok=True)
            file = chance.choice(
                [
                    p
                    for p in sorted(copy.iterdir())
                    if p.suffix in (".safetensors", ".gguf", ".encodings")
                    or p.name in ("config.json", "base.json")
                ]
            )
            file.write_bytes(broken(file.name, file.read_bytes(), chance))
            start = time.perf_counter()
            try:
                endings.setdefault(source.name, Counter())[use(copy)] += 1
            except Exception as error:
                shutil.copytree(copy, ROOT / "fuzz-failure", dirs_exist_ok=True)
                raise SystemExit(
                    f"{source.name}, {file.name}: {type(error).__name__}: {error}; the folder is kept as fuzz-failure"
                ) from error
            slowest = max(slowest, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    record = {
        "machine": machine_line(),
        "seconds": seconds,
        "seed": seed,
        "sources": {name: dict(found) for name, found in sorted(endings.items())},
        "slowest_seconds": round(slowest, 3),
        "peak_rss_bytes": peak * 1024,
        "peak_rss_growth_bytes": (peak - before) * 1024,
    }
    print(record)
    (ROOT / "benchmarks" / "results" / "fuzz_bases.json").write_text(
        json.dumps(record, indent=1) + "\n"
    )


if __name__ == "__main__":
    main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:3]))
