"""What a quantizer refuses, and that it may work in place."""

import pytest
import torch

from qwlora.errors import CalibrationError
from qwlora.grid.scheme import PerChannel, RangeEstimator, Scheme
from qwlora.simulation.fake_quantizer import Quantizer, estimate_encodings


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def test_quantizer_says_what_it_cannot_do() -> None:
    for scheme in (Scheme(8, granularity=PerChannel(0)), Scheme(4, False, float_offset=True)):
        with pytest.raises(CalibrationError, match=r"it: activations need a per-tensor .*not int"):
            Quantizer("it", scheme)
    quantizer = Quantizer("it", Scheme(8))
    with pytest.raises(CalibrationError, match="it has no encoding yet; call calibrate"):
        quantizer(torch.ones(2))
    quantizer.observer.update(torch.ones(2))
    quantizer.estimator = RangeEstimator("sqnr")
    with pytest.raises(CalibrationError, match=r"it was observed without a histogram.* sqnr"):
        estimate_encodings([quantizer])
    for bad in (torch.nan, 3e38):
        quantizer = Quantizer("it", Scheme(8, symmetric=False))
        quantizer.observer.update(torch.tensor([bad, -bad]))
        with pytest.raises(CalibrationError, match="it: the observed range is not finite, or"):
            estimate_encodings([quantizer])


def test_in_place_is_the_same_and_only_where_no_gradient_is() -> None:
    quantizer = Quantizer("it", Scheme(8, symmetric=False), in_place=True)
    x = torch.randn(3, 50)
    quantizer.observer.update(x)
    estimate_encodings([quantizer])
    assert quantizer.encoding is not None
    expected = quantizer.encoding.fake_quantize(x)
    learning = x.clone().requires_grad_()
    assert torch.equal(quantizer(learning), expected)
    assert torch.equal(learning, x)
    for given in (x.clone(), x.half()):
        expected = quantizer.encoding.fake_quantize(given)
        assert quantizer(given) is given
        assert torch.equal(given, expected)
