"""GGUF files of small models with random blocks, written by the gguf package."""

from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)
from transformers.pytorch_utils import Conv1D

HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}
"""Where the float16 numbers of a block are, the scale first."""
KINDS = tuple(HALVES)
WITH_MINIMUM = tuple(kind for kind, places in HALVES.items() if len(places) == 2)


def random_rows(kind: str, rows: int, width: int, seed: int = 0) -> np.ndarray:
    """Random block bytes; some scales are zero, and some negative if the type allows it."""
    rng = np.random.default_rng(seed)
    values, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * width // values, size), dtype=np.uint8)
    for place in HALVES[kind]:
        numbers = (rng.normal(size=len(blocks)) * 0.05).astype(np.float16)
        if place == HALVES[kind][0] and kind in WITH_MINIMUM:
            numbers = abs(numbers)
        numbers[::7] = 0
        blocks[:, place : place + 2] = numbers.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def with_one_zero(values: torch.Tensor) -> torch.Tensor:
    """Bits, after -0.0 has become 0.0."""
    return (values + 0.0).view(torch.int32)


def metadata_of(arch: str, config: PretrainedConfig, key: str) -> dict[str, Any]:
    """The pairs that transformers reads for `config`, by its own table."""
    pairs = {
        f"{arch}.{name}": getattr(config, hf_name, None)
        for name, hf_name in GGUF_CONFIG_MAPPING[key].items()
        if hf_name
    }
    return {name: value for name, value in pairs.items() if value is not None}


def stored_shapes(arch: str, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a file's tensors by transformers' name table, without a tied head."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    processor = TENSOR_PROCESSORS.get(arch, TensorProcessor)(config=config.to_dict())
    shapes = {}
    for name, parameter in get_gguf_hf_weights_map(model, processor).items():
        if parameter not in model.state_dict() or (
            name == "output.weight" and config.tie_word_embeddings
        ):
            continue
        shape = tuple(model.state_dict()[parameter].shape)
        module = model.get_submodule(parameter.rpartition(".")[0])
        if isinstance(module, Conv1D) and len(shape) == 2:
            shape = shape[::-1]
        if name.endswith("_exps"):
            name += ".weight"
            shape = (shape[0], shape[1] // (1 if "down" in name else 2), shape[2])
        shapes[name] = (shape[0], *shape[2:]) if "conv1d.weight" in name else shape
    return shapes


def write_file(
    path: Path,
    arch: str,
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    kind_of: Callable[[str, tuple[int, ...]], str],
    tokens: int = 96,
    from_floats: bool = False,
) -> Path:
    """A file with random numbers in every tensor; `from_floats`: blocks as the gguf package rounds
    random floats, instead of random bytes."""
    writer = GGUFWriter(path, arch)
    writer.add_name("test")
    for key, value in metadata.items():
        match value:
            case list() | tuple():
                writer.add_array(key, list(value))
            case str():
                writer.add_string(key, value)
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case _:
                writer.add_float32(key, value)
    writer.add_token_list([f"t{i}" for i in range(tokens)])
    for seed, (name, shape) in enumerate(shapes.items()):
        kind = kind_of(name, shape)
        values = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.05
        values = -abs(values) - 0.01 if name.endswith("ssm_a") else values
        if kind == "F64":
            writer.add_tensor(name, values.astype(np.float64) / 3)
            continue
        if kind in KINDS and not from_floats:
            rows = random_rows(kind, int(np.prod(shape[:-1])), shape[-1], seed)
            data = rows.reshape(*shape[:-1], -1)
        else:
            data = gguf.quants.quantize(values, GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_turn(kinds: tuple[str, ...] = KINDS) -> Callable[[str, tuple[int, ...]], str]:
    """A choice of types: matrices take the quantized ones in turn, vectors F32, F16 and BF16.

    Experts that are joined to one tensor have one type.
    """
    matrices, vectors = cycle(kinds), cycle(("F32", "F16", "BF16"))
    chosen: dict[str, str] = {}

    def kind_of(name: str, shape: tuple[int, ...]) -> str:
        joined = name.replace("gate_exps", "up_exps")
        if joined not in chosen:
            chosen[joined] = next(matrices if len(shape) > 1 and shape[-1] % 256 == 0 else vectors)
        return chosen[joined]

    return kind_of
