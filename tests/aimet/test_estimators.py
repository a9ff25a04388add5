"""Percentile and SQNR against AIMET's, on data that has to be cut: the same objective, finer bins, and more grids to choose from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qwlora.grid.encoding import Encoding
from qwlora.grid.estimators import PercentileObserver, SqnrObserver, SquaredErrorObserver
from qwlora.grid.scheme import PerChannel, PerTensor, Scheme

from .oracle import PercentileEncodingAnalyzer, SqnrEncodingAnalyzer, aimet_numbers, aimet_quantizer
from .table import Table

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
BITWIDTHS = (2, 3, 4, 8)
SCHEMES = [Scheme(b, s, g) for b in BITWIDTHS for s in (True, False) for g in (PerTensor(), PerChannel(0))]


def datasets() -> dict[str, Tensor]:
    """[8, 512], of the shapes that weights and activations have."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(8, 512, generator=generator)
    return {
        "normal": normal,
        "shifted": normal + 1.5,
        "heavy tails": normal**3,
        "outliers": torch.where(torch.rand(8, 512, generator=generator) < 0.005, 30 * normal, normal),
        "after relu": normal.clamp(min=0),
        "uniform": torch.rand(8, 512, generator=generator) - 0.3,
        "two lumps": 0.2 * normal + torch.where(torch.rand(8, 512, generator=generator) < 0.5, 4.0, -2.0),
    }


def weighted_error(x: Tensor, encoding: Encoding, gamma: float) -> float:
    """Mean squared error on the data itself, clipped values weighing `gamma`."""
    x = x.double()
    leaf = x.clone().requires_grad_()
    values = encoding.fake_quantize(leaf)
    (inside,) = torch.autograd.grad(values.sum(), leaf)
    return float(((values.detach() - x).square() * torch.where(inside > 0, 1.0, gamma)).mean())


def theirs(x: Tensor, scheme: Scheme, analyzer, **options) -> Encoding:
    scale, offset = aimet_numbers(aimet_quantizer(x, scheme, analyzer, **options))
    shape = scheme.scale_shape(tuple(x.shape))
    return Encoding(scheme, scale.view(shape), offset.view(shape))


def ours(x: Tensor, scheme: Scheme, kind, *options) -> Encoding:
    observer = kind(scheme, *options)
    observer.update(x)
    return observer.encoding()


CASES = [
    pytest.param(SqnrObserver, 3.0, 3.0, 1.002, "SQNR (gamma 3)", id="sqnr"),
    pytest.param(SquaredErrorObserver, 1.0, 1.0, 1.001, "squared error (AIMET: SQNR with gamma 1)", id="squared-error"),
    pytest.param(SquaredErrorObserver, 1.0, 3.0, 1.001, "squared error (AIMET: SQNR with its default gamma 3)", id="squared-error-default"),
]


@pytest.mark.parametrize(("kind", "gamma", "their_gamma", "tolerance", "name"), CASES)
def test_error_is_not_larger(kind, gamma, their_gamma, tolerance, name, table: Table):
    """Both see the data through bins, so that a choice can miss the best by the width of one; that is the tolerance."""
    found = []
    for x in datasets().values():
        for scheme in SCHEMES:
            aimet = theirs(x, scheme, SqnrEncodingAnalyzer, gamma=their_gamma)
            found.append(weighted_error(x, ours(x, scheme, kind), gamma) / weighted_error(x, aimet, gamma))
    found.sort()
    larger = sum(ratio > 1 for ratio in found)
    table.notes.append(
        f"**{name}**: error on the data over AIMET's in {len(found)} cases ({len(datasets())} sets of data, {len(SCHEMES)} schemes): "
        f"least {found[0]:.3f}, median {found[len(found) // 2]:.4f}, at most {found[-1]:.5f} (allowed {tolerance}); above 1 in {larger}."
    )
    assert found[-1] <= tolerance
    assert found[len(found) // 2] < 1


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile(percentile, table: Table):
    """AIMET's bin edges are those of [min, max] in 2048; both ends may differ by one bin of each of us."""
    worst, error_ratios = 0.0, []
    for x in datasets().values():
        for scheme in SCHEMES:
            if scheme.bitwidth == 2 and scheme.symmetric:
                continue  # AIMET spares the positive end's clipping for min-max at 2 bits but not here
            mine, aimet = ours(x, scheme, PercentileObserver, percentile), theirs(x, scheme, PercentileEncodingAnalyzer, percentile=percentile)
            rows = x.reshape(mine.scale.numel(), -1)
            bin_width = (rows.amax(1) - rows.amin(1)) / 2048 + rows.abs().amax(1) / 2048
            divisor = scheme.steps / 2 - 0.5 if scheme.symmetric else scheme.steps / 2
            apart = (mine.scale - aimet.scale).abs().flatten() * divisor / bin_width
            worst = max(worst, float(apart.max()))
            error_ratios.append(weighted_error(x, mine, 1.0) / weighted_error(x, aimet, 1.0))
    table.notes.append(
        f"**percentile {percentile}**: the ends of the range lie at most {worst:.2f} bins (one of AIMET's plus one of ours) from AIMET's; "
        f"squared error over AIMET's at most {max(error_ratios):.3f}, median {sorted(error_ratios)[len(error_ratios) // 2]:.4f}."
    )
    assert worst <= 2
