"""Small models and changes to their files that several tests need."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from qwlora.grid.encoding import QuantizedTensor

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).eval()


def mixtral(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES | {"num_local_experts": 3} | changes)).eval()


def gpt2(**changes: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32}
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**sizes | changes)).eval()


IDS = torch.arange(40).view(2, 20)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """What a model computes of `IDS`, without dropout."""
    found: Tensor = model.eval()(IDS).logits
    return found


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


def edit_tensors(path: Path, changes: dict[str, Tensor | None]) -> None:
    """Change tensors of a safetensors file; None removes one."""
    content = load_file(path) | changes
    tensors = {name: tensor for name, tensor in content.items() if tensor is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def read_integers(checkpoint: Any, name: str) -> QuantizedTensor:
    """A tensor that must be stored as integers."""
    value = checkpoint.read(name)
    assert isinstance(value, QuantizedTensor), name
    return value


def values_of(checkpoint: Any) -> tuple[dict[str, Tensor], set[str]]:
    """All tensors as floats, and the names of those that are stored as integers."""
    stored = {name: checkpoint.read(name) for name in checkpoint.names()}
    packed = {name for name, value in stored.items() if isinstance(value, QuantizedTensor)}
    floats = {name: v.dequantize() if name in packed else v for name, v in stored.items()}
    return floats, packed


def equal(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether both have the same names and, bit for bit, the same values."""
    same_names = tensors.keys() == expected.keys()
    return same_names and all(torch.equal(tensors[name], expected[name]) for name in expected)


def read_floats(checkpoint: Any, name: str) -> Tensor:
    """A tensor that must be stored as floats."""
    value = checkpoint.read(name)
    assert isinstance(value, Tensor), name
    return value
