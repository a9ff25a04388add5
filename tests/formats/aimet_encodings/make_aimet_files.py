"""Write the golden files of these tests, files/*.encodings and files/model.onnx, with aimet-torch.

    python tests/formats/aimet_encodings/make_aimet_files.py       by hand, in an environment with aimet-torch

One small network has everything that AIMET can write: per tensor, per channel, per block, LPBQ, a
float16 weight, a float8 weight (2.x only), a zero point shift of one half.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

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
    m.channel.param_quantizers["weight"] = QuantizeDequantize(
        (4, 1, 1, 1), bitwidth=8, symmetric=True
    )
    m.block.param_quantizers["weight"] = QuantizeDequantize(
        (6, 2), bitwidth=4, symmetric=True, block_size=(1, 4)
    )
    m.lpbq.param_quantizers["weight"] = GroupedBlockQuantizeDequantize(
        (8, 3),
        bitwidth=4,
        symmetric=True,
        decompressed_bw=8,
        block_size=(1, 2),
        block_grouping=(1, 3),
    )
    m.float16.param_quantizers["weight"] = FloatQuantizeDequantize(dtype=torch.float16)
    m.shifted.param_quantizers["weight"] = QuantizeDequantize(
        (4, 1), bitwidth=2, symmetric=True, zero_point_shift=0.5
    )
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
            sim.onnx.export(
                (x,),
                str(Path(directory) / "model.onnx"),
                input_names=["x"],
                output_names=["y"],
                dynamo=False,
                encoding_version=version,
            )
            for file in Path(directory).iterdir():
                print(file)
                target = FILES / (
                    f"aimet-{version}.encodings" if file.suffix == ".encodings" else f"{file.name}"
                )
                target.write_bytes(file.read_bytes())
    quantsim.encoding_version = "1.0.0"
    sim, x = simulation(float8=False)
    with tempfile.TemporaryDirectory() as directory:
        sim.export(
            directory, "model", x
        )  # the older exporter: other names, blocks in another order, float16 entries
        (FILES / "aimet-export-1.0.0.encodings").write_bytes(
            (Path(directory) / "model.encodings").read_bytes()
        )
        by_module = Path(directory) / "model_torch.encodings"
        (FILES / "aimet-export-1.0.0_torch.encodings").write_bytes(by_module.read_bytes())
        sim.save_encodings_to_json(directory, "model")
        (FILES / "aimet-modules.json").write_bytes((Path(directory) / "model.json").read_bytes())


if __name__ == "__main__":
    sys.exit(main())
