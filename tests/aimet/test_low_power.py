"""LPBQ encodings and learned-scale gradients equal AIMET's."""

import pytest
import torch

from qwlora.grid.encoding import measure
from qwlora.grid.scheme import Lpbq, Scheme

from .oracle import aimet_lpbq_quantizer, compare

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
                x = torch.randn(8, 256, generator=torch.Generator().manual_seed(seed))
                x = x ** (1 + 2 * (seed % 2)) * 10.0 ** -(seed % 3)
                scheme = Scheme(bitwidth, granularity=Lpbq(size, scale_bitwidth))
                encoding, quantizer = measure(x, scheme), aimet_lpbq_quantizer(x, scheme)
                compare(comparison, x, encoding, quantizer)
                row, integers = scheme.granularity.split(encoding.scale)
                theirs = quantizer.get_encodings()
                assert torch.equal(row.flatten(), theirs.per_channel_scale.detach().flatten())
                wanted = theirs.per_block_int_scale.detach().to(torch.int32)
                assert torch.equal(integers, wanted.view(integers.shape))
    assert comparison.scales_differ == comparison.offsets_differ == comparison.values_differ == 0
