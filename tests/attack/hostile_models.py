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


def _index(name: str) -> Attack:
    def attack(folder: Path, marker: Path) -> None:
        names = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return attack


AUTO = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
HEADER = '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, %s]}}'

HIDDEN_SIZES: tuple[Any, ...] = ("64", None, [64], 64.5, 10**9)
JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")

MODELS: dict[str, Attack] = {
    "code for config.json": remote_code("config.json", model_type="evil", auto_map=AUTO),
    "code for a known model type": remote_code("config.json", auto_map=AUTO),
    "code for the tokenizer": remote_code(
        "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={"AutoTokenizer": [None, "evil.EvilTokenizer"]},
    ),
    "code in config.json for the tokenizer": remote_code(
        "config.json",
        model_type="evil",
        auto_map=AUTO | {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]},
    ),
    "NaN in a norm": put("model.norm.weight", float("nan")),
    "NaN in the embedding": put("model.embed_tokens.weight", float("nan")),
    "NaN in a linear layer": put("model.layers.0.mlp.up_proj.weight", float("nan")),
    "infinity in a norm": put("model.layers.0.input_layernorm.weight", float("inf")),
    "infinity in a linear layer": put("model.layers.1.mlp.up_proj.weight", float("-inf")),
    "half a model: one layer of two": edit("config.json", num_hidden_layers=1),
    "three layers of two": edit("config.json", num_hidden_layers=3),
    "no attention heads": edit("config.json", num_attention_heads=0),
    "negative layers": edit("config.json", num_hidden_layers=-1),
    **{f"hidden_size is {x}": edit("config.json", hidden_size=x) for x in HIDDEN_SIZES},
    "layers in words": edit("config.json", num_hidden_layers="two"),
    "vocabulary of a trillion": edit("config.json", vocab_size=10**12),
    "rope factor is NaN": edit(
        "config.json",
        rope_parameters={"rope_type": "linear", "factor": float("nan"), "rope_theta": 1e4},
    ),
    "attention of a hub repository": edit("config.json", _attn_implementation="somebody/kernel"),
    "rms_norm_eps is text": edit("config.json", rms_norm_eps="x"),
    "rope parameters are text": edit("config.json", rope_parameters="x"),
    "dtype is unknown": edit("config.json", dtype="int99"),
    "hidden_act is unknown": edit("config.json", hidden_act="evil"),
    "architectures is a number": edit("config.json", architectures=5, model_type=7),
    "model_type is a list": edit("config.json", model_type=["llama"]),
    "model_type is missing": write("config.json", "{}"),
    **{f"{file} is a pipe": pipe(file) for file in ("config.json", "tokenizer.json", WEIGHTS)},
    **{f"{file} is deep": write(file, f'{{"model": {DEEP}}}') for file in JSON},
    **{f"{file} is a list": write(file, "[1, 2]") for file in JSON},
    "config.json is empty": write("config.json", ""),
    "config.json is not UTF-8": write("config.json", b'{"model_type": "\xff\xfe"}'),
    "config.json has 5,000 digits": write(
        "config.json", f'{{"model_type": "llama", "hidden_size": {LONG}}}'
    ),
    "tokenizer.json is cut": lambda folder, marker: os.truncate(folder / "tokenizer.json", 700),
    "tokenizer.json is not UTF-8": write("tokenizer.json", b'{"model": "\xff"}'),
    "tokenizer_config.json has wrong types": edit(
        "tokenizer_config.json", tokenizer_class=["x"], model_max_length="many"
    ),
    "pickled weights": pickled("pytorch_model.bin", WEIGHTS),
    "pickled shards": _one_pickled_shard,
    "pickle named .safetensors": pickled(WEIGHTS, WEIGHTS),
    "weights are a link to themselves": _loop,
    "weights are empty": write(WEIGHTS, b""),
    "header of an exabyte": header("{}", 2**60),
    "header is deep": header(f'{{"a": {DEEP}}}'),
    "header is a list": header("[]"),
    "offsets beyond the end": header(HEADER % 8000),
    "offsets are negative": header(HEADER % -8),
    "shard outside of the folder": _index("../outside.safetensors"),
    "shard that is missing": _index("model-00001-of-00009.safetensors"),
}

# transformers has a class of its own for the model type, and QWLoRA chooses the attention, so what
# the folder names is not needed
HARMLESS = ("code for a known model type", "attention of a hub repository")

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def _update(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Attack:
    """Add tensors to an adapter, or replace them."""
    return tensors(lambda content: content.update(change(content)), ADAPTER_WEIGHTS)


def _named(new: Callable[[str], str], keeps_old: bool = True) -> Attack:
    """Store every tensor of an adapter under another name too, or only there."""

    def change(content: dict[str, torch.Tensor]) -> None:
        for name in list(content):
            content[new(name)] = content[name].clone() if keeps_old else content.pop(name)

    return tensors(change, ADAPTER_WEIGHTS)


def _number(place: int, value: float) -> Attack:
    def change(content: dict[str, torch.Tensor]) -> None:
        next(iter(content.values())).view(-1)[place] = value

    return tensors(change, ADAPTER_WEIGHTS)


CONFIG = "adapter_config.json"
ADAPTERS: dict[str, Attack] = {
    "pickled adapter": pickled("adapter_model.bin", ADAPTER_WEIGHTS),
    "pickle named .safetensors": pickled(ADAPTER_WEIGHTS, ADAPTER_WEIGHTS),
    "wrong shapes": _update(lambda content: {name: torch.zeros(3, 5) for name in [*content][:2]}),
    "other names": _named(lambda name: name.replace("lora_A", "lora_C"), keeps_old=False),
    "no tensors": tensors(dict.clear, ADAPTER_WEIGHTS),
    "NaN": _number(0, float("nan")),
    "infinity": _number(-1, float("-inf")),
    "more layers than the model": _named(lambda name: name.replace("layers.1.", "layers.7.")),
    "an embedding of its own": _update(
        lambda _: {"base_model.model.model.embed_tokens.weight": torch.zeros(4, 64)}
    ),
    "names that differ in case only": _named(str.upper),
    "weights are deep": header(f'{{"a": {DEEP}}}', file=ADAPTER_WEIGHTS),
    "weights with a header of an exabyte": header("{}", 2**60, file=ADAPTER_WEIGHTS),
    "config is deep": write(CONFIG, f'{{"a": {DEEP}}}'),
    "config is a list": write(CONFIG, "[]"),
    "config is empty": write(CONFIG, ""),
    "config is not UTF-8": write(CONFIG, b'{"r": "\xff"}'),
    "config has 5,000 digits": write(CONFIG, f'{{"peft_type": "LORA", "r": {LONG}}}'),
    "rank in words": edit(CONFIG, r="four"),
    "rank is negative": edit(CONFIG, r=-4),
    "rank is a billion": edit(CONFIG, r=10**9),
    "rank is a list": edit(CONFIG, r=[4]),
    "alpha in words": edit(CONFIG, lora_alpha="much"),
    "alpha is 0": edit(CONFIG, lora_alpha=0),
    "alpha is NaN": edit(CONFIG, lora_alpha=float("nan")),
    "weights the other way around": edit(CONFIG, fan_in_fan_out=True),
    "targets are a number": edit(CONFIG, target_modules=5),
    "unknown kind": edit(CONFIG, peft_type="EVIL"),
    "kind is a list": edit(CONFIG, peft_type=["LORA"]),
    "layers repeated for ever": edit(CONFIG, layer_replication=[[0, 10**7]]),
    "code of another library": remote_code(
        CONFIG, auto_mapping={"base_model_class": "EvilModel", "parent_library": "evil"}, r="x"
    ),
}
