"""Model folders that somebody else made, and not with good intentions."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

DEEP = "[" * 100_000 + "]" * 100_000
LONG = "9" * 5000
WEIGHTS = "model.safetensors"
CODE = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class EvilConfig(LlamaConfig): pass
class EvilModel(LlamaForCausalLM): pass
class EvilTokenizer(PreTrainedTokenizerFast): pass
"""

Attack = Callable[[Path, Path], None]


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.marker}'",)


def edit(file: str, **values: Any) -> Attack:
    """Change keys of a JSON file."""

    def attack(folder: Path, marker: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))

    return attack


def write(file: str, content: str | bytes) -> Attack:
    """Replace a file."""

    def attack(folder: Path, marker: Path) -> None:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / file).write_bytes(data)

    return attack


def tensors(change: Callable[[dict[str, torch.Tensor]], Any], file: str = WEIGHTS) -> Attack:
    """Change the tensors of a safetensors file."""

    def attack(folder: Path, marker: Path) -> None:
        content = load_file(folder / file)
        change(content)
        save_file(content, folder / file, metadata={"format": "pt"})

    return attack


def put(name: str, value: float) -> Attack:
    def change(content: dict[str, torch.Tensor]) -> None:
        content[name].view(-1)[3] = value

    return tensors(change)


def remote_code(file: str, **values: Any) -> Attack:
    def attack(folder: Path, marker: Path) -> None:
        (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
        edit(file, **values)(folder, marker)

    return attack


def pickled(file: str, instead_of: str) -> Attack:
    """Weights as a pickle that runs a command."""

    def attack(folder: Path, marker: Path) -> None:
        (folder / instead_of).unlink()
        (folder / file).write_bytes(pickle.dumps({"weight": Evil(marker)}))

    return attack


def header(text: str, length: int | None = None, file: str = WEIGHTS) -> Attack:
    """A safetensors file with this header."""
    data = text.encode()
    return write(file, struct.pack("<Q", len(data) if length is None else length) + data)


def pipe(file: str) -> Attack:
    """Replace a file by a pipe that nobody writes to."""

    def attack(folder: Path, marker: Path) -> None:
        (folder / file).unlink()
        os.mkfifo(folder / file)

    return attack


def _loop(folder: Path, marker: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / WEIGHTS)


def _one_pickled_shard(folder: Path, marker: Path) -> None:
    pickled("pytorch_model-00001-of-00001.bin", WEIGHTS)(folder, marker)
    index = {"metadata": {}, "weight_map": {"weight": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def _write_each(kind: str, file: str, contents: dict[str, str | bytes]) -> dict[str, Attack]:
    return {f"{kind} is {name}": write(file, content) for name, content in contents.items()}


AUTO = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
AUTO_TOKENIZER = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
NEGATIVE_OFFSETS = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, -8]}}'
BROKEN: dict[str, str | bytes] = {
    "empty": "",
    "not UTF-8": b'{"model_type": "\xff\xfe"}',
    "of 5,000 digits": f'{{"model_type": "llama", "peft_type": "LORA", "r": {LONG}}}',
}
VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_size": ("64", None, [64], 64.5, 10**9),
    "num_hidden_layers": (-1, "two"),
    "rms_norm_eps": ("x",),
    "rope_parameters": ("x", {"rope_type": "linear", "factor": float("nan"), "rope_theta": 1e4}),
    "model_type": (["llama"], 7),
}
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

# What tests of the readers cover is not repeated: formats/huggingface/test_reader_folder.py,
# formats/test_trust_remote_code.py, cli/test_cli.py, adapter/test_adapter.py.
MODELS: dict[str, Attack] = {
    "code for a known model type": remote_code("config.json", auto_map=AUTO),
    "code in config.json for the tokenizer": remote_code(
        "config.json", model_type="evil", auto_map=AUTO | AUTO_TOKENIZER
    ),
    "NaN in the embedding": put("model.embed_tokens.weight", float("nan")),
    "infinity in a linear layer": put("model.layers.1.mlp.up_proj.weight", float("-inf")),
    **{
        f"{key} is {value}": edit("config.json", **{key: value})
        for key, values in VALUES.items()
        for value in values
    },
    "model_type is missing": write("config.json", "{}"),
    **_write_each("config.json", "config.json", BROKEN),
    **{f"{file} is a pipe": pipe(file) for file in ("config.json", "tokenizer.json", WEIGHTS)},
    **{f"{file} is deep": write(file, f'{{"model": {DEEP}}}') for file in JSON},
    **{f"{file} is a list": write(file, "[1, 2]") for file in JSON},
    "tokenizer.json is cut": lambda folder, marker: os.truncate(folder / "tokenizer.json", 700),
    "tokenizer_config.json has wrong types": edit(
        "tokenizer_config.json", tokenizer_class=["x"], model_max_length="many"
    ),
    "pickled shards": _one_pickled_shard,
    "weights are a link to themselves": _loop,
    "header is a list": header("[]"),
    "offsets are negative": header(NEGATIVE_OFFSETS),
}

# transformers has a class of its own for the model type, so what the folder names is not needed
HARMLESS = ("code for a known model type",)

CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def _renamed(new: Callable[[str], str], keeps_old: bool = True) -> Attack:
    """Store every tensor of an adapter under another name too, or only there."""

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in list(content):
            content[new(name)] = content[name].clone() if keeps_old else content.pop(name)

    return tensors(change, ADAPTER_WEIGHTS)


def _reshape(content: dict[str, torch.Tensor]) -> None:
    for name in [*content][:2]:
        content[name] = torch.zeros(3, 5)


ADAPTERS: dict[str, Attack] = {
    "pickle named .safetensors": pickled(ADAPTER_WEIGHTS, ADAPTER_WEIGHTS),
    "wrong shapes": tensors(_reshape, ADAPTER_WEIGHTS),
    "other names": _renamed(lambda name: name.replace("lora_A", "lora_C"), keeps_old=False),
    "names that differ in case only": _renamed(str.upper),
    "no tensors": tensors(dict.clear, ADAPTER_WEIGHTS),
    "weights are deep": header(f'{{"a": {DEEP}}}', file=ADAPTER_WEIGHTS),
    "weights with a header of an exabyte": header("{}", 2**60, file=ADAPTER_WEIGHTS),
    **_write_each("config", CONFIG, BROKEN),
    **{f"rank is {rank}": edit(CONFIG, r=rank) for rank in ("four", -4, 10**9, [4])},
    "weights the other way around": edit(CONFIG, fan_in_fan_out=True),
    "targets are a number": edit(CONFIG, target_modules=5),
    "kind is a list": edit(CONFIG, peft_type=["LORA"]),
    "code of another library": remote_code(
        CONFIG, auto_mapping={"base_model_class": "EvilModel", "parent_library": "evil"}, r="x"
    ),
}
