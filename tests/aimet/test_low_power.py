"""LPBQ encodings and learned-scale gradients equal AIMET's."""

from __future__ import annotations

import pytest
import torch

from qwlora.grid.encoding import Encoding
from qwlora.grid.lpbq import split_scales
from qwlora.grid.min_max import measure
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme

from .oracle import aimet_lpbq_quantizer, aimet_quantizer, compare

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
def test_lpbq_encodings_equal_aimets(bitwidth, comparison):
    comparison.name = (
        f"min-max, random matrices, int{bitwidth} LPBQ, 1 to 8 bits of integer scale, "
        "blocks of 2, 16 and 64"
    )
    for scale_bitwidth in (1, 2, 4, 8):
        for size in (2, 16, 64):
            for seed in range(5):
                x = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed)) ** (
                    1 + 2 * (seed % 2)
                ) * 10.0 ** -(seed % 3)
                scheme = Scheme(bitwidth, granularity=Lpbq(size, scale_bitwidth))
                encoding, quantizer = measure(x, scheme), aimet_lpbq_quantizer(x, scheme)
                compare(comparison, x, encoding, quantizer)
                row, integers = split_scales(encoding.scale, scheme)
                theirs = quantizer.get_encodings()
                assert torch.equal(row, theirs.per_channel_scale.detach().flatten())
                assert torch.equal(
                    integers,
                    theirs.per_block_int_scale.detach().to(torch.int32).view(integers.shape),
                )
    assert comparison.scales_differ == comparison.offsets_differ == comparison.values_differ == 0


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(8)], ids=str)
@pytest.mark.parametrize("stretch", [0.7, 1.6])
@pytest.mark.parametrize("bitwidth", [2, 4, 8])
def test_gradient_of_a_learned_scale(bitwidth, stretch, granularity):
    """AIMET trains min and max, `scale = (max - min) / steps`: its gradient is ours over steps."""
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    upstream = torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    scheme = Scheme(bitwidth, granularity=granularity)
    quantizer, measured = aimet_quantizer(x, scheme), measure(x, scheme)
    encoding = Encoding(scheme, measured.scale.clone().requires_grad_(), measured.offset)
    (ours,) = torch.autograd.grad(encoding.fake_quantize(x * stretch), encoding.scale, upstream)
    (theirs,) = torch.autograd.grad(quantizer(x * stretch), quantizer.max, upstream)
    assert torch.allclose(ours.flatten(), theirs.flatten() * scheme.steps, rtol=1e-3, atol=1e-3)
