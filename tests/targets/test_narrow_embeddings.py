"""Embeddings and heads that are floats are stored in 16 bits where that is exact. The files are run:
they compute the same bits as with float32, in less than two thirds of the space."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from conftest import tiny_model
from qwlora import Schemes, quantize_, simulate
from qwlora.errors import RecipeError
from qwlora.grid.scheme import PerBlock, Scheme
from qwlora.recipe import load_recipe
from qwlora.targets.onnx.onnx import export_onnx
from qwlora.targets.onnx.onnx_runtime import OnnxModel
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import ExportedBase
from targets.client_programs import with_clients

pytestmark = pytest.mark.usefixtures("shared_captures")
IDS = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(5))
W4 = Scheme(4, True, PerBlock(32))
BITS = (32, 16)
STORED = {
    torch.float16: (onnx.TensorProto.FLOAT16, "F16"),
    torch.bfloat16: (onnx.TensorProto.BFLOAT16, "BF16"),
    torch.float32: (onnx.TensorProto.FLOAT, "F32"),
}


def base(dtype: torch.dtype, architecture: str = "llama") -> Any:
    """A packed base whose embedding, and head, a checkpoint of `dtype` had: llama's is tied, qwen3
    has a head of its own."""
    model = tiny_model(architecture, layers=1)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[0, 0] = 2.0**-30 if dtype == torch.bfloat16 else 1.0  # no float16 has that
            layer.weight.copy_(layer.weight.to(dtype).float())
    quantize_(model, W4, "rtn")
    return model


def written(target: str, model: Any, folder: Path) -> list[Path]:
    folders = [folder / str(bits) for bits in BITS]
    for bits, part in zip(BITS, folders, strict=True):
        part.mkdir()
        TARGETS[target].backend.write_base(ExportedBase(model, None, None, bits), part)
    return folders


def in_onnx_runtime(file: Path) -> Tensor:
    session = onnxruntime.InferenceSession(str(file))
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS)}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feeds[value.name] = np.arange(IDS.shape[1])[None]
        elif value.name not in feeds:
            shape = [
                1 if axis == 0 else 0 if isinstance(n, str) else n
                for axis, n in enumerate(value.shape)
            ]
            feeds[value.name] = np.zeros(shape, np.float32)
    return torch.from_numpy(session.run(["logits"], feeds)[0])


def stored_types(file: Path) -> dict[str, int]:
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    return {t.name: t.data_type for t in tensors if list(t.dims) == [260, 64]}


@pytest.mark.parametrize(
    ("dtype", "architecture", "tables"),
    [
        (torch.bfloat16, "qwen3", 2),
        pytest.param(torch.float16, "llama", 1, marks=pytest.mark.slow),
        pytest.param(torch.float32, "llama", 1, marks=pytest.mark.slow),
    ],
)
def test_logits_are_equal_to_the_bit(
    dtype: torch.dtype, architecture: str, tables: int, tmp_path: Path
) -> None:
    wide, narrow = (p / "model.onnx" for p in written("genai", base(dtype, architecture), tmp_path))
    assert torch.equal(in_onnx_runtime(wide), in_onnx_runtime(narrow))
    assert [*stored_types(narrow).values()] == [STORED[dtype][0]] * tables
    assert [*stored_types(wide).values()] == [onnx.TensorProto.FLOAT] * tables
    onnx.checker.check_model(str(narrow))


@pytest.mark.slow
def test_a_simulation_with_float_embeddings(tmp_path: Path) -> None:
    batch, logits = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, []
    simulation = simulate(base(torch.float16), batch, Schemes(policy="weights-only"))
    simulation.calibrate([batch])
    for bits in BITS:
        export_onnx(simulation.graph(), tmp_path / str(bits), embedding_bits=bits)
        logits.append(OnnxModel(tmp_path / str(bits)).logits(IDS))
    assert torch.equal(*logits)
    assert [*stored_types(tmp_path / "16/model.onnx").values()] == [onnx.TensorProto.FLOAT16]


@pytest.mark.parametrize("name", with_clients(["genai", "openvino", "hf"]))
def test_in_the_runtime(name: str, tmp_path: Path) -> None:
    wide, narrow = written(name, base(torch.float16), tmp_path)
    opened = [TARGETS[name].backend.open(part, "base") for part in (wide, narrow)]
    assert torch.equal(*(runtime.logits(IDS) for runtime in opened))
    first, second = (runtime.decode(IDS, 8) for runtime in opened)
    assert first == second
    if name == "hf":
        with safe_open(narrow / "model.safetensors", "pt") as file:
            assert file.get_slice("model.embed_tokens.weight").get_dtype() == "F16"


@pytest.mark.parametrize(("target", "bits"), [("aimet", 16), ("mlx", 16), ("gguf", 32)])
def test_a_target_that_cannot_hold_them_refuses(recipe_for: Any, target: str, bits: int) -> None:
    changes = (f"export.targets=[{target}]", "simulation.residual_adds=quantize")
    path = recipe_for()
    load_recipe(path, changes)
    with pytest.raises(
        RecipeError, match=rf"{target}: export\.embedding_bits: .* {48 - bits} bits only"
    ):
        load_recipe(path, (*changes, f"export.embedding_bits={bits}"))
