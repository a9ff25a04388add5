"""Random damage to models, bases and encodings files: it ends in a value or in one error of ours.

JSON (also the header of safetensors files) gets values of other types, absurd numbers, and keys
renamed, dropped and added; anything else flipped bits, cut ends, repeated pieces, and runs of NaN,
infinite, negative or zero numbers. Whatever opens is read whole. What reads well as encodings is
also written in every version that holds it.
"""

import copy
import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import byte_tokenizer, tiny_model
from formats.gguf_models import metadata_of, stored_shapes, write_file
from formats.huggingface.test_gptq_awq_mlx import awq_model
from formats.huggingface.test_reader_compressed_tensors import model_folder
from qwlora import load_base, quantize_, save_base
from qwlora.analysis.inspect_model import inspect_source
from qwlora.errors import QwloraError
from qwlora.formats.aimet_encodings import EncodingsFile, convert, read_encodings, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.formats.open_checkpoint import load_precomputed, open_checkpoint
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import PerChannel, Scheme, parse_scheme
from qwlora.quantize.layer_rules import LayerRule

from .record import Record
from .victims import seeds

pytestmark = pytest.mark.attack

TRIALS = 150
FILES = Path(__file__).parents[1]
ENCODINGS = "model.encodings"
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1}
NUMBERS = (
    *(struct.pack("<f", x) for x in (float("nan"), float("inf"), -1.0, 0.0, 1e-45)),
    *(struct.pack("<e", x) for x in (float("nan"), -0.5, 0.0)),
    b"\xff",
)
ODD: list[Any] = [None, True, -1, 0, 1e308, -1e-320, 10**30, float("nan"), float("inf")]
ODD += ["", "int4", "é\0", [], {}, [[]], [[1], [2, 3]], {"a": 1}, [1e99] * 100]
KEYS = ("name", "scale", "offset", "block_size", "axis", "y_scale", "x" * 50)


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value."""
    children = node.items() if isinstance(node, dict) else ()
    for key, child in enumerate(node) if isinstance(node, list) else children:
        yield (*path, key)
        yield from places(child, (*path, key))


def break_json(content: Any, chance: random.Random) -> Any:
    """One to four changes of values, keys or structure."""
    content = copy.deepcopy(content)
    for _ in range(chance.randint(1, 4)):
        if not (known := list(places(content))):
            break
        *parents, last = chance.choice(known)
        node = content
        for key in parents:
            node = node[key]
        match chance.randrange(5):
            case 0:
                node[last] = copy.deepcopy(chance.choice(ODD))
            case 1:
                del node[last]
            case 2 if isinstance(node, dict):
                node[chance.choice(KEYS)] = node.pop(last)
            case 3 if isinstance(node[last], int | float):
                node[last] = node[last] * chance.choice([-1, 0, 2, 1e30, 0.5])
            case _:
                node[last] = [copy.deepcopy(node[last])] * chance.randint(0, 3)
    return content


def break_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bits, a cut end, repeated pieces, deep nesting, or runs of odd numbers."""
    data = bytearray(content)
    at = chance.randrange(len(data))
    match chance.randrange(5):
        case 0:
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
        case 1:
            del data[at:]
        case 2:
            data[at:at] = data[at : at + chance.randint(1, 200)] * chance.randint(1, 50)
        case 3:
            data[at:at] = b"[" * chance.randint(1, 20000)
        case _:
            for _ in range(chance.randint(1, 6)):
                run = chance.choice(NUMBERS) * chance.randint(1, 40)
                at = chance.randrange(0, len(data), 2)
                data[at : at + len(run)] = run
    return bytes(data)


def broken(file: Path, chance: random.Random) -> bytes:
    """The content of a file, damaged."""
    content, kind = file.read_bytes(), chance.random()
    if file.suffix in (".json", ".encodings") and kind > 0.2:
        return json.dumps(break_json(json.loads(content), chance)).encode()
    if file.suffix == ".safetensors" and kind < 0.5:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.dumps(break_json(json.loads(content[8 : 8 + length]), chance)).encode()
        said = len(header) if kind < 0.4 else chance.choice([length, 0, 2**40, 2**63])
        return struct.pack("<Q", said) + header + content[8 + length :]
    return break_bytes(content, chance)


def make_float(folder: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).save_pretrained(folder)


def make_gptq(folder: Path) -> None:
    ignored = shutil.ignore_patterns("expected*")
    shutil.copytree(FILES / "formats/files/gptqmodel-llama", folder, ignore=ignored)


def make_compressed(folder: Path) -> None:
    four = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": four, "format": "pack-quantized"}
    model_folder(folder, {"group_0": group}, {"down_proj": ("pack-quantized", four)})


def make_aimet(folder: Path) -> None:
    make_float(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    grids = {
        name: measure(weight, Scheme(4, True, PerChannel(0)))
        for name, weight in model.state_dict().items()
        if weight.ndim == 2 and "embed" not in name
    }
    entries = [entry_of(name, grid, "2.0.0") for name, grid in grids.items()]
    write_encodings(EncodingsFile("2.0.0", entries), folder / ENCODINGS)


def make_gguf(folder: Path) -> None:
    folder.mkdir()
    config = LlamaConfig(**{**SIZES, "vocab_size": 16}, tie_word_embeddings=True)
    types = {"attn_q": "Q4_0", "attn_k": "Q8_0", "ffn_up": "Q4_1", "ffn_gate": "Q5_1"}
    write_file(
        folder / "model.gguf",
        "llama",
        metadata_of("llama", config, "llama"),
        stored_shapes("llama", config),
        lambda name, _: next((t for part, t in types.items() if f".{part}." in name), "F32"),
        tokens=16,
    )


def make_base(folder: Path) -> None:
    model = tiny_model("llama")
    schemes = {"*.q_proj": "w3-block32-asymmetric", "*.up_proj": "w4-lpbq16"}
    rules = [LayerRule(match, parse_scheme(scheme)) for match, scheme in schemes.items()]
    quantize_(model, "w4-block32", "rtn", rules=[*rules, LayerRule("*.v_proj", None)])
    folder.mkdir()
    save_base(model, folder, byte_tokenizer(), source="somewhere")


def make_encodings(folder: Path) -> None:
    """The files that AIMET wrote."""
    folder.mkdir()
    for file in (FILES / "formats/aimet_encodings/files").iterdir():
        if file.suffix in (".json", ".encodings"):
            shutil.copy(file, folder / f"{file.name}.encodings")


def use_encodings(folder: Path) -> None:
    for path in sorted(folder.glob("*.encodings")):
        file = read_encodings(path)
        for version in ("0.6.1", "1.0.0", "2.0.0", "2.1.0"):
            try:
                write_encodings(convert(file, version, lossy=True), path.with_suffix(".out"))
            except QwloraError:
                continue
            read_encodings(path.with_suffix(".out"))


def use_model(folder: Path) -> None:
    gguf, encodings = folder / "model.gguf", folder / ENCODINGS
    path = gguf if gguf.exists() else folder
    if (path / "base.json").exists():
        load_base(path)
    else:
        load_precomputed(open_checkpoint(path, encodings if encodings.exists() else None))
    inspect_source(str(path))


MAKES = (make_float, make_gptq, awq_model, make_compressed, make_aimet, make_gguf, make_base)


@pytest.mark.parametrize("make", [*MAKES, make_encodings])
def test_random_damage_is_refused_or_read(
    make: Callable[[Path], Any], seed: int, record: Record, tmp_path: Path
) -> None:
    whole, place = tmp_path / "whole", tmp_path / "damaged"
    make(whole)
    kind = make.__name__.removeprefix("make_").removesuffix("_model")
    use = use_encodings if make is make_encodings else use_model
    use(whole)
    patterns = ("*.safetensors", "*.gguf", "*.encodings", "config.json", "base.json")
    files = [file for pattern in patterns for file in sorted(whole.glob(pattern))]
    refused, since = 0, len(record.failures)
    for trial in range(TRIALS):
        chance = seeds(seed, "fuzz", kind, str(trial))
        shutil.copytree(whole, place)
        file = chance.choice(files)
        (place / file.name).write_bytes(broken(file, chance))
        problem = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                use(place)
        except QwloraError:
            refused += 1
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        record.add("fuzz", kind, problem, f"seed {seed}, trial {trial}: {file.name}")
        shutil.rmtree(place)
    record.check(since)
    assert refused > TRIALS / 4
