"""Grids read from AIMET's files, of all exporters and versions, round as AIMET's quantizers."""

from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
pytest.importorskip(
    "aimet_torch", reason="runs in an environment with aimet-torch: make test-aimet"
)

from aimet_torch.common import quantsim  # noqa: E402
from aimet_torch.quantization.affine import (  # noqa: E402
    GroupedBlockQuantizeDequantize,
    QuantizeDequantize,
)
from aimet_torch.quantsim import QuantizationSimModel  # noqa: E402

from qwlora.formats.aimet_encodings import read_encodings  # noqa: E402
from qwlora.formats.aimet_encodings.grids import TensorLayout, grid_of  # noqa: E402
from qwlora.grid.scheme import Lpbq, PerBlock  # noqa: E402

SHAPES = {
    "tensor": (12, 16),
    "channel": (24, 12),
    "asymmetric": (16, 24),
    "block": (12, 16),
    "block_asymmetric": (32, 12),
    "lpbq": (16, 32),
    "shifted": (20, 16),
}


class Layers(nn.Module):
    """For [batch, tokens, features], so that each Linear becomes a MatMul."""

    def __init__(self) -> None:
        super().__init__()
        for name, (out_features, in_features) in SHAPES.items():
            setattr(self, name, nn.Linear(in_features, out_features, bias=name == "block"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in SHAPES:
            x = getattr(self, name)(x)
        return x


def simulation() -> tuple[QuantizationSimModel, Layers, torch.Tensor]:
    torch.manual_seed(0)
    x, model = torch.randn(2, 3, 16), Layers().eval()
    sim = QuantizationSimModel(model, x, default_param_bw=8, default_output_bw=16)
    blocks, lpbq = {"block_size": (1, 4)}, {"block_size": (1, 8), "block_grouping": (1, 4)}
    quantizers = {
        "tensor": QuantizeDequantize((), 8, True),
        "channel": QuantizeDequantize((24, 1), 4, True),
        "asymmetric": QuantizeDequantize((16, 1), 4, False),
        "block": QuantizeDequantize((12, 4), 4, True, **blocks),
        "block_asymmetric": QuantizeDequantize((32, 3), 2, False, **blocks),
        "lpbq": GroupedBlockQuantizeDequantize((16, 4), 4, True, decompressed_bw=8, **lpbq),
        "shifted": QuantizeDequantize((20, 1), 2, True, zero_point_shift=0.5),
    }
    for name, quantizer in quantizers.items():
        getattr(sim.model, name).param_quantizers["weight"] = quantizer
    sim.compute_encodings(lambda m: m(x))
    return sim, model, x


def exported(
    folder: Path, exporter: str, version: str
) -> tuple[QuantizationSimModel, Layers, Path]:
    sim, model, x = simulation()
    file = folder / "model.encodings"
    if exporter == "torch":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantsim, "encoding_version", version)
            sim.export(str(folder), "model", x)
        is_by_module = version == "0.6.1" and not file.exists()
        return sim, model, folder / "model_torch.encodings" if is_by_module else file
    names = {"input_names": ["x"], "output_names": ["y"], "encoding_version": version}
    sim.onnx.export((x,), str(folder / "model.onnx"), dynamo=exporter == "dynamo", **names)
    return sim, model, file


@pytest.mark.parametrize("version", ["0.6.1", "1.0.0", "2.0.0", "2.1.0"])
@pytest.mark.parametrize("exporter", ["torch", "onnx", "dynamo"])
def test_grids_round_as_aimets_quantizers(tmp_path: Path, exporter: str, version: str) -> None:
    if exporter == "torch" and version >= "2":
        pytest.skip("AIMET's older exporter does not write 2.x")
    sim, model, path = exported(tmp_path, exporter, version)
    file = read_encodings(path)
    for name, shape in SHAPES.items():
        numbered = f"{name}.weight" not in file.by_name
        entry = file.by_name[f"{name}.weight_0" if numbered else f"{name}.weight"]
        assert numbered == (exporter != "torch")
        placement = TensorLayout(
            shape, transposed=numbered, block_order="tensor" if numbered else "channel"
        )
        grid = grid_of(entry, placement, version)
        weight, simulated = getattr(model, name).weight.detach(), getattr(sim.model, name)
        theirs = simulated.param_quantizers["weight"](simulated.weight).detach()
        if name == "shifted":  # the same codes; (q + offset + 0.5) * scale is added differently
            scale = grid.scale[:, None]
            assert torch.equal(grid.quantize(weight), (theirs / scale + 1.5).round())
            torch.testing.assert_close(grid.fake_quantize(weight), theirs, rtol=3e-7, atol=0)
            continue
        assert torch.equal(grid.fake_quantize(weight), theirs)
        is_lpbq = name == "lpbq" and version != "0.6.1"  # which lists the scales of its blocks
        assert isinstance(grid.scheme.granularity, Lpbq) == is_lpbq
        is_blocks = "block" in name or (name == "lpbq" and not is_lpbq)
        assert isinstance(grid.scheme.granularity, PerBlock) == is_blocks
        assert grid.scheme.symmetric == ("asymmetric" not in name)
