"""Write the golden files of these tests, files/*.encodings, with aimet-torch.

    python tests/formats/aimet_encodings/make_aimet_files.py       by hand, in an environment with aimet-torch

One small network has everything that AIMET can write: per tensor, per channel, per block, LPBQ, a
float16 weight, a float8 weight (2.x only), a zero point shift of one half.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import aimet_torch
import torch
from aimet_torch.common import quantsim
from aimet_torch.quantization.affine import GroupedBlockQuantizeDequantize, QuantizeDequantize
from aimet_torch.quantization.float import FloatQuantizeDequantize
from aimet_torch.quantsim import QuantizationSimModel

FILES = Path(__file__).parent / "files"


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channel = torch.nn.Conv2d(2, 4, 1, bias=True)
        self.relu = torch.nn.ReLU()
        self.block = torch.nn.Linear(8, 6, bias=False)
        self.lpbq = torch.nn.Linear(6, 8, bias=False)
        self.float16 = torch.nn.Linear(8, 4, bias=False)
        self.shifted = torch.nn.Linear(4, 4, bias=False)
        self.float8 = torch.nn.Linear(4, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.channel(x)).flatten(1)
        return self.float8(self.shifted(self.float16(self.lpbq(self.block(x)))))


def simulation(float8: bool) -> tuple[QuantizationSimModel, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 2, 1)
    sim = QuantizationSimModel(Network().eval(), x, default_param_bw=8, default_output_bw=8)
    m = sim.model
    grouped = {"decompressed_bw": 8, "block_size": (1, 2), "block_grouping": (1, 3)}
    for layer, quantizer in {
        m.channel: QuantizeDequantize((4, 1, 1, 1), bitwidth=8, symmetric=True),
        m.block: QuantizeDequantize((6, 2), bitwidth=4, symmetric=True, block_size=(1, 4)),
        m.lpbq: GroupedBlockQuantizeDequantize((8, 3), bitwidth=4, symmetric=True, **grouped),
        m.float16: FloatQuantizeDequantize(dtype=torch.float16),
        m.shifted: QuantizeDequantize((4, 1), bitwidth=2, symmetric=True, zero_point_shift=0.5),
    }.items():
        layer.param_quantizers["weight"] = quantizer
    if float8:
        m.float8.param_quantizers["weight"] = FloatQuantizeDequantize(
            exponent_bits=4, mantissa_bits=3, finite=True, unsigned_zero=False, shape=()
        )
    sim.compute_encodings(lambda model: model(x))
    return sim, x


def main() -> None:
    print("aimet-torch", aimet_torch.__version__)
    for version in ("0.6.1", "1.0.0", "2.0.0", "2.1.0"):
        with tempfile.TemporaryDirectory() as directory:
            sim, x = simulation(float8=version >= "2")
            names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
            path = str(Path(directory) / "model.onnx")
            sim.onnx.export((x,), path, dynamo=False, encoding_version=version, **names)
            for file in Path(directory).glob("*.encodings"):
                shutil.copy(file, FILES / f"aimet-{version}.encodings")
    quantsim.encoding_version = "1.0.0"
    sim, x = simulation(float8=False)
    with tempfile.TemporaryDirectory() as directory:
        # the older exporter: other names, blocks in another order, float16 entries
        sim.export(directory, "model", x)
        sim.save_encodings_to_json(directory, "model")
        for name, target in (
            ("model.encodings", "aimet-export-1.0.0.encodings"),
            ("model_torch.encodings", "aimet-export-1.0.0_torch.encodings"),
            ("model.json", "aimet-modules.json"),
        ):
            shutil.copy(Path(directory) / name, FILES / target)


if __name__ == "__main__":
    sys.exit(main())
