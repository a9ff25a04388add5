"""torch's integer kernels give the product with the packed weight, up to bfloat16, for few rows."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from conftest import packed_model
from formats.packing import quantized
from qwlora import PackedLinear
from qwlora.errors import GridError
from qwlora.grid.scheme import Lpbq, PerBlock, PerChannel, PerTensor, Scheme, SignedBlock
from qwlora.nn import pack_module
from qwlora.nn.few_row_kernels import EXACT, ROWS, use_few_row_kernels_
from qwlora.nn.frozen import assert_frozen

FITS = [
    *(Scheme(bits, granularity=PerBlock(32)) for bits in (2, 3, 4)),
    *(Scheme(4, granularity=PerBlock(size)) for size in (64, 96, 192)),
    Scheme(3, False, PerBlock(32)),
    Scheme(4, False, PerBlock(64)),
    Scheme(4, False, PerBlock(32), float_offset=True),
    Scheme(4, granularity=Lpbq(32)),
    *(Scheme(bits, granularity=SignedBlock(32)) for bits in (2, 4)),
    Scheme(4, granularity=PerChannel(0)),
    Scheme(4, False, PerChannel(0)),
    Scheme(8, granularity=PerChannel(0)),
]
FITS_NOT = [
    Scheme(5, granularity=PerBlock(32)),
    Scheme(8, granularity=PerBlock(32)),
    Scheme(8, False, PerChannel(0)),
    Scheme(4, granularity=PerBlock(16)),
    Scheme(4, granularity=PerTensor()),
    Scheme(4, granularity=PerChannel(1)),
]


def packed(scheme: Scheme, outputs: int = 48, inputs: int = 192) -> PackedLinear:
    torch.manual_seed(0)
    found = quantized(torch.randn(outputs, inputs), scheme)
    linear = nn.Linear(inputs, outputs).requires_grad_(False)
    linear.bias.copy_(torch.randn(outputs))
    return pack_module(linear, found)


@torch.no_grad()
@pytest.mark.parametrize("scheme", FITS, ids=str)
def test_few_rows_are_multiplied_in_bfloat16_and_others_exactly(scheme: Scheme) -> None:
    layer = packed(scheme)
    few, many = torch.randn(2, ROWS // 2, 192), torch.randn(ROWS + 1, 192)
    expected, exact = layer(few), layer(many)
    assert use_few_row_kernels_(layer) == 1
    found = layer(few)
    assert found.dtype == torch.float32
    error = (found - expected).norm() / (expected - layer.bias).norm()
    assert 0 < error < 0.01
    assert torch.equal(layer(many), exact)
    assert torch.equal(layer.add_to(torch.ones_like(found), few), found + 1)


@torch.no_grad()
@pytest.mark.parametrize("scheme", [None, *FITS_NOT], ids=str)
def test_a_head_without_a_kernel_has_8_bits_but_its_largest_logits(scheme: Scheme | None) -> None:
    torch.manual_seed(0)
    head = packed(scheme, outputs=320) if scheme else nn.Linear(192, 320)
    few, many = torch.randn(2, ROWS // 2, 192), torch.randn(ROWS + 1, 192)
    expected, exact = head(few), head(many)
    assert use_few_row_kernels_(nn.Sequential(head), head=head) == 1
    logits = head(few)
    error = (logits - expected).norm() / (expected - head.bias).norm()
    assert 0 < error < 0.015
    best, where = expected.topk(EXACT // 2)
    torch.testing.assert_close(logits.gather(-1, where), best)
    assert torch.equal(head(many), exact)


@torch.no_grad()
@pytest.mark.parametrize(
    ("scheme", "outputs"), [*((scheme, 48) for scheme in FITS_NOT), (FITS[0], 40)], ids=str
)
def test_what_does_not_fit_the_kernel_stays_exact(scheme: Scheme, outputs: int) -> None:
    layer, x = packed(scheme, outputs), torch.randn(1, 192)
    expected = layer(x)
    assert use_few_row_kernels_(layer) == 0
    assert torch.equal(layer(x), expected)
    head = LoraLinear(nn.Linear(192, 48), "default", LoraConfig(r=2), r=2)
    assert use_few_row_kernels_(nn.Sequential(head), head=head) == 0  # an adapter wraps it


def test_gradients_pass_and_the_model_is_not_taken_for_a_frozen_one() -> None:
    layer = packed(Scheme(4, granularity=PerBlock(32)))
    x = torch.randn(1, 192, requires_grad=True)
    expected = layer(x)
    use_few_row_kernels_(layer)
    assert torch.equal(layer(x), expected)
    assert layer(x).requires_grad
    model = packed_model("llama", layers=1)
    assert use_few_row_kernels_(model) == 7
    with pytest.raises(GridError):
        assert_frozen(model)
