"""The product's estimators against AIMET's, every error measured on the data itself.

Up to 4 bits the error of a grid is exact but for the place of a value in its bin of the histogram, and
AIMET's candidates are among ours. From 6 bits on the error is modeled (`grid/activation_ranges.py`); what
that costs is bounded here.

A percentile is not chosen for its error. What is compared is how far its range is from that of the
sorted data.
"""

import pytest
import torch
from torch import Tensor

from qwlora.grid.activation_ranges import RangeObserver, estimate_ranges
from qwlora.grid.encoding import Encoding, encoding_from_range
from qwlora.grid.scheme import PerChannel, RangeEstimator, Scheme
from qwlora.quantize.scale_search import search_scale

from .oracle import PercentileEncodingAnalyzer, SqnrEncodingAnalyzer, aimet_numbers, aimet_quantizer
from .table import Table
from .test_smollm2 import weights

pytestmark = [pytest.mark.aimet, pytest.mark.filterwarnings("ignore")]
BITWIDTHS = (2, 3, 4, 6, 8, 16)
SCHEMES = [Scheme(bitwidth, symmetric) for bitwidth in BITWIDTHS for symmetric in (True, False)]


def datasets(rows: int = 8, columns: int = 512) -> dict[str, Tensor]:
    """[rows, columns], of the shapes that weights and activations have."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(rows, columns, generator=generator)
    some, half = (torch.rand(rows, columns, generator=generator) < p for p in (0.005, 0.5))
    return {
        "normal": normal,
        "shifted": normal + 1.5,
        "heavy tails": normal**3,
        "outliers": torch.where(some, 30 * normal, normal),
        "after relu": normal.clamp(min=0),
        "uniform": torch.rand(rows, columns, generator=generator) - 0.3,
        "two lumps": 0.2 * normal + torch.where(half, 4.0, -2.0),
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
    return Encoding(scheme, scale.view(()), offset.view(()))


def ours(batches: list[Tensor], scheme: Scheme, estimator: RangeEstimator) -> Encoding:
    observer = RangeObserver(estimator.needs_histogram)
    for batch in batches:
        observer.update(batch)
    low, high = estimate_ranges([observer], scheme, estimator)
    return encoding_from_range(low[0], high[0], scheme)


def error_ratio(batches: list[Tensor], scheme: Scheme, name: str) -> float:
    """Our error over AIMET's, on all batches."""
    x, estimator = torch.cat(batches), RangeEstimator(name)
    gamma = estimator.gamma
    aimet = theirs(x, scheme, SqnrEncodingAnalyzer, gamma=gamma)
    mine = ours(batches, scheme, estimator)
    return weighted_error(x, mine, gamma) / weighted_error(x, aimet, gamma)


def note(table: Table, what: str, ratios: list[float], allowed: float) -> None:
    ratios.sort()
    table.notes.append(
        f"**{what}**: error on the data over AIMET's in {len(ratios)} cases: least "
        f"{ratios[0]:.3f}, median {ratios[len(ratios) // 2]:.4f}, largest {ratios[-1]:.4f} "
        f"(allowed {allowed}); above 1 in {sum(r > 1 + 1e-6 for r in ratios)}."
    )
    assert ratios[-1] <= allowed


NAMES = {"sqnr": "SQNR (gamma 3)", "squared-error": "squared error (AIMET: SQNR with gamma 1)"}
EXACT = 1.015
# up to 4 bits, 6 and 8 bits, 16 bits
BITS = [((2, 3, 4), EXACT), ((6, 8), 1.03), ((16,), 1.05)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("bits", "allowed"), BITS)
def test_error_on_few_values(bits, allowed, name, table: Table):
    ratios = [
        error_ratio([x], scheme, name)
        for x in datasets().values()
        for scheme in SCHEMES
        if scheme.bitwidth in bits
    ]
    note(table, f"{NAMES[name]}, sets of 4,096 values, {bits} bits", ratios, allowed)


@pytest.mark.parametrize("name", NAMES)
def test_error_on_many_values(name, table: Table):
    """524,288 values in 8 batches."""
    ratios = [
        error_ratio(list(x.view(8, 128, 512)), scheme, name)
        for x in datasets(1024).values()
        for scheme in SCHEMES
        if scheme.bitwidth < 16
    ]
    note(table, f"{NAMES[name]}, sets of 524,288 values, 2 to 8 bits", ratios, 1.02)


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_percentile(percentile, table: Table):
    """Ours is the range of the sorted data, within half a bin of 2^-7; AIMET's that of bin edges."""
    widths = []
    for x in datasets().values():
        for scheme in SCHEMES:
            if scheme.bitwidth == 2 and scheme.symmetric:
                continue  # AIMET avoids the positive end's clipping for min-max, but not here
            mine = ours([x], scheme, RangeEstimator("percentile", percentile))
            aimet = theirs(x, scheme, PercentileEncodingAnalyzer, percentile=percentile)
            ascending = x.flatten().sort().values
            outside = int(len(ascending) * (100 - percentile) / 100 + 1e-9)
            exact = encoding_from_range(ascending[outside], ascending[-1 - outside], scheme)
            assert float(mine.scale) == pytest.approx(float(exact.scale), rel=2**-8)
            bin_width = (ascending[-1] - ascending[0]) / 2048
            difference = (aimet.scale - exact.scale).abs().double() * scheme.steps / bin_width
            widths.append(float(difference))
    widths.sort()
    table.notes.append(
        f"**percentile {percentile}**, {len(widths)} cases: our scale is that of the "
        "sorted data's range within 0.4 % in every one. AIMET takes an edge of one of its 2,048 "
        f"bins: the width of its range is off by a median of {widths[len(widths) // 2]:.2f} of its "
        f"bins and at most {widths[-1]:.2f} (allowed 4)."
    )
    assert widths[-1] <= 4


def solver_ratio(weight: Tensor, scheme: Scheme) -> float:
    """Error of the encoding of the solver `sqnr` over that of AIMET's SQNR analyzer."""
    mine = search_scale(weight, scheme, clipping_penalty=3.0)
    scale, offset = aimet_numbers(aimet_quantizer(weight, scheme, SqnrEncodingAnalyzer, gamma=3.0))
    shape = scheme.scale_shape(tuple(weight.shape))
    aimet = Encoding(scheme, scale.view(shape), offset.view(shape))
    return weighted_error(weight, mine, 3.0) / weighted_error(weight, aimet, 3.0)


def test_the_sqnr_solver_on_every_weight_of_smollm2(table: Table):
    """What is rounded is weights, so this is the estimator that the solver runs on them."""
    per_tensor, per_channel = [], []
    for i, weight in enumerate(weights()):
        if weight.ndim == 2 and 0 < i < 40:
            per_channel.append(solver_ratio(weight, Scheme(4, granularity=PerChannel(0))))
        if i % 3 == 0:
            per_tensor.append(solver_ratio(weight, Scheme(4)))
    note(
        table, "solver sqnr, every third tensor of SmolLM2-135M, int4 per tensor", per_tensor, 1.03
    )
    note(table, "solver sqnr, matrices of SmolLM2-135M, int4 per channel", per_channel, 1.02)
