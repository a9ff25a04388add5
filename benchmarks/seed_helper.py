"""Step 1 as the helper of AIMET's QW-LoRA guide does it, in aimet-torch: 4-bit symmetric per tensor, for every parameter of a model.

python benchmarks/seed_helper.py BEFORE.safetensors AFTER.safetensors         with a Python that has aimet-torch; benchmarks/fidelity.py calls it
"""

import sys

import torch
from aimet_torch.quantization.affine import QuantizeDequantize
from safetensors.torch import load_file, save_file


def rounded(parameter: torch.Tensor) -> torch.Tensor:
    quantizer = QuantizeDequantize((), 4, True)
    with torch.no_grad(), quantizer.compute_encodings():
        quantizer(parameter)
    with torch.no_grad():
        return torch.Tensor(quantizer(parameter)).contiguous()


if __name__ == "__main__":
    save_file(
        {name: rounded(parameter) for name, parameter in load_file(sys.argv[1]).items()},
        sys.argv[2],
    )
