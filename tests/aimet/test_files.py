"""A file that we write, loaded by AIMET, gives its quantizers our grid.

AIMET 2.42 loads only version 0.6.1 (`QuantizationSimModel.load_encodings`). For later versions,
tests/formats/aimet_encodings reads files that AIMET wrote.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.aimet
aimet_torch = pytest.importorskip("aimet_torch")

import torch  # noqa: E402
from aimet_torch.v2.quantization.affine import QuantizeDequantize  # noqa: E402

from qwlora.formats.aimet_encodings import (  # noqa: E402
    EncodingsFile,
    IntegerEncoding,
    convert,
    read_encodings,
    write_encodings,
)
from qwlora.grid.encoding import Encoding as GridEncoding  # noqa: E402
from qwlora.grid.encoding import measure  # noqa: E402
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme  # noqa: E402

GRIDS = [
    Scheme(bitwidth, symmetric, granularity)
    for bitwidth in (4, 8)
    for symmetric in (True, False)
    for granularity in (PerTensor(), PerChannel(0), PerBlock(16))
]


def simulated(scheme: Scheme) -> tuple[torch.nn.Module, object]:
    """One Linear of 64 -> 24, and AIMET's simulation with a weight quantizer of the scheme."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 24, bias=False)).eval()
    sim = aimet_torch.QuantizationSimModel(model, torch.randn(2, 64), default_param_bw=8)
    shape, block = {
        PerTensor: ((), None),
        PerChannel: ((24, 1), None),
        PerBlock: ((24, 4), (1, 16)),
    }[type(scheme.granularity)]
    quantizer = QuantizeDequantize(
        shape, qmin=0, qmax=2**scheme.bitwidth - 1, symmetric=False, block_size=block
    )
    sim.model[0].param_quantizers["weight"] = quantizer
    return model, sim


def file_of(name: str, encoding: GridEncoding) -> EncodingsFile:
    granularity = encoding.scheme.granularity
    value = IntegerEncoding(
        name=name,
        bitwidth=encoding.scheme.bitwidth,
        scale=encoding.scale.flatten().numpy().astype(np.float64)
        if encoding.scale.ndim
        else encoding.scale.numpy().astype(np.float64),
        offset=encoding.offset.flatten().numpy().astype(np.int64)
        if encoding.offset.ndim
        else encoding.offset.numpy().astype(np.int64),
        symmetric=encoding.scheme.symmetric,
        signed=None,
        axis=None,
        block_size=granularity.size if isinstance(granularity, PerBlock) else None,
        zero_point_shift=0.0,
    )
    return EncodingsFile(version="1.0.0", encodings=(value,), parameters=frozenset({name}))


@pytest.mark.parametrize("scheme", GRIDS, ids=str)
def test_our_file_gives_aimet_our_grid(scheme: Scheme, tmp_path: Path) -> None:
    model, sim = simulated(scheme)
    weight = model[0].weight.detach()
    encoding = measure(weight, scheme)
    write_encodings(
        convert(file_of("0.weight", encoding), "0.6.1", lossy=True), tmp_path / "ours.encodings"
    )
    assert read_encodings(tmp_path / "ours.encodings").version == "0.6.1"
    sim.load_encodings(str(tmp_path / "ours.encodings"), strict=True)
    quantizer = sim.model[0].param_quantizers["weight"]
    assert (quantizer.bitwidth, quantizer.symmetric) == (scheme.bitwidth, scheme.symmetric)
    scale, offset = quantizer.get_scale().detach(), quantizer.get_offset().detach()
    ulp = torch.nextafter(encoding.scale, torch.tensor(torch.inf)) - encoding.scale
    assert bool(((scale.view(encoding.scale.shape) - encoding.scale).abs() <= ulp).all())
    signed_shift = scheme.symmetric_offset if scheme.symmetric else 0
    assert torch.equal(offset.view(encoding.offset.shape) + signed_shift, encoding.offset.float())
    step = encoding.fake_quantize(weight) - quantizer(weight).detach()
    assert float(step.abs().max()) <= 1e-6
