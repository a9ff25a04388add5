"""Min-max encodings of random tensors equal AIMET's, scale, offset and fake-quantized values."""

import pytest
import torch

from qwlora.grid.encoding import measure
from qwlora.grid.scheme import BITWIDTHS, PerBlock, PerChannel, PerTensor, Scheme

from .oracle import aimet_quantizer, compare

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
PER_KIND = 80
KINDS = {"per tensor": PerTensor, "per channel": PerChannel, "per block": PerBlock}


def random_case(kind: type, seed: int) -> tuple[torch.Tensor, Scheme]:
    """A tensor of 1 to 4 axes, of some magnitude and skew, and a scheme of this granularity."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    axes = pick(1, 2, 3, 4)
    size = pick(1, 2, 16, 32)
    shape = [pick(1, 3, 8) for _ in range(axes)]
    shape[-1] = size * pick(1, 2, 5)
    granularity = {
        PerTensor: PerTensor(),
        PerChannel: PerChannel(pick(*range(axes))),
        PerBlock: PerBlock(size),
    }[kind]
    scheme = Scheme(pick(*BITWIDTHS), pick(True, False), granularity)
    x = torch.randn(shape, generator=generator) * pick(1e-12, 1e-5, 1e-2, 1.0, 1e4) + pick(
        0.0, 0.0, 3.0, -3.0
    )
    return x * pick(*[1.0] * 19, 0.0), scheme


@pytest.mark.parametrize("kind", KINDS)
def test_random_tensors(kind, comparison):
    comparison.name = f"min-max, random tensors of 1 to 4 axes, every bitwidth, {kind}"
    for seed in range(PER_KIND):
        x, scheme = random_case(KINDS[kind], seed)
        compare(comparison, x, measure(x, scheme), aimet_quantizer(x, scheme))
    assert comparison.worst_ulps <= 1
    assert comparison.offsets_differ == 0
    assert comparison.values_differ == 0


@pytest.mark.parametrize(
    "scheme", [Scheme(8, False), Scheme(4), Scheme(2), Scheme(4, granularity=PerBlock(4))], ids=str
)
@pytest.mark.parametrize("stretch", [0.7, 1.0, 1.6])
def test_gradient_of_the_input(scheme, stretch):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    encoding, quantizer = measure(x, scheme), aimet_quantizer(x, scheme)
    gradients = []
    for fake_quantize in (encoding.fake_quantize, quantizer):
        leaf = (x * stretch).requires_grad_()
        gradients.append(torch.autograd.grad(fake_quantize(leaf).square().sum(), leaf)[0])
    assert torch.equal(*gradients)
