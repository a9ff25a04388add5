from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import CalibrationError
from qwlora.grid.estimators import HistogramObserver, MovingAverageObserver, PercentileObserver, SqnrObserver, SquaredErrorObserver, rows_of_groups
from qwlora.grid.histogram import BINS, Histogram
from qwlora.grid.observer import MinMaxObserver, measure, search
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme

from .strategies import brief, cases

EVERY = [PercentileObserver, SquaredErrorObserver, SqnrObserver, MovingAverageObserver]
ON_HISTOGRAMS = EVERY[:3]


def observed(kind, scheme, *batches):
    observer = kind(scheme)
    for batch in batches:
        observer.update(batch)
    return observer


def equal(a, b) -> bool:
    return torch.equal(a.scale, b.scale) and torch.equal(a.offset, b.offset)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@brief
@given(cases(bitwidths=(4,)), st.floats(-60, 60))
def test_every_value_is_counted_in_its_bin(case, exponent):
    x, scheme = case
    x = rows_of_groups(x * 2.0**exponent, scheme)
    histogram = Histogram(len(x), x.device)
    histogram.update(x, x.abs().amax(1))
    assert (histogram.counts.sum(1) == x.shape[1]).all()
    for row, counts in enumerate(histogram.counts):
        places = counts.nonzero().flatten()
        centres = histogram.centres()[row, places].repeat_interleave(counts[places])
        width = 2.0 ** float(histogram.exponent[row]) / 4096
        assert ((centres - x[row].sort().values).abs() <= width * 1.00001).all()
        assert width <= max(float(x[row].abs().max()), 2.0**-100) / 2047


@brief
@given(cases(bitwidths=(4,)), st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=2, max_size=4), st.randoms())
def test_counts_do_not_depend_on_order_or_division(case, factors, random):
    x, scheme = case
    batches = [x * f for f in factors]
    whole = observed(HistogramObserver, scheme, *batches).histogram
    random.shuffle(batches)
    first, second = observed(HistogramObserver, scheme, batches[0]), observed(HistogramObserver, scheme, *batches[1:])
    first.merge(second)
    assert torch.equal(first.histogram.exponent, whole.exponent)
    assert torch.equal(first.histogram.counts, whole.counts)


def test_long_rows_are_counted_in_pieces():
    x = gaussian(2, 2**18 + 77)
    histogram = Histogram(2, x.device)
    histogram.update(x, x.abs().amax(1))
    for row in range(2):
        bins = np.trunc(x[row].numpy().astype(np.float64) * 4096 / 2.0 ** int(histogram.exponent[row])).astype(int) + 4095
        assert np.array_equal(histogram.counts[row].numpy(), np.bincount(bins, minlength=BINS))


def test_exact_zeros_lie_in_the_centre_of_their_bin():
    histogram = Histogram(1, torch.device("cpu"))
    histogram.update(torch.tensor([[0.0, -0.0, 1.0]]), torch.tensor([1.0]))
    assert int(histogram.counts[0, BINS // 2]) == 2
    assert float(histogram.centres()[0, BINS // 2]) == 0


@brief
@given(cases(), st.sampled_from(EVERY), st.floats(0.1, 10))
def test_merge_of_two_streams_is_the_whole(case, kind, factor):
    x, scheme = case
    batches = [x, x.flip(0) * factor, -x]
    whole = observed(kind, scheme, *batches).encoding()
    for at in (1, 2):
        first, second = observed(kind, scheme, *batches[:at]), observed(kind, scheme, *batches[at:])
        first.merge(second)
        merged = first.encoding()
        if kind is MovingAverageObserver:
            assert torch.allclose(merged.scale, whole.scale, rtol=1e-6)
        else:
            assert equal(merged, whole)
    empty = kind(scheme)
    empty.merge(observed(kind, scheme, *batches))
    assert equal(empty.encoding(), whole)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(256)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
def test_squared_error_is_near_the_exact_search_and_below_minmax(bitwidth, symmetric, granularity):
    x = gaussian(8, 512) * (1 + torch.arange(8.0).unsqueeze(1)) + 0.3
    scheme = Scheme(bitwidth, symmetric, granularity)
    found, exact, minmax = (
        float((e.fake_quantize(x) - x).double().square().sum())
        for e in (observed(SquaredErrorObserver, scheme, x).encoding(), search(x, scheme), measure(x, scheme))
    )
    assert found <= minmax
    assert found <= 1.02 * exact


def test_sqnr_clips_less_than_squared_error():
    x = gaussian(1, 10000)
    plain, weighted = (observed(kind, Scheme(4), x).encoding() for kind in (SquaredErrorObserver, SqnrObserver))
    assert float(plain.scale) < float(weighted.scale) < float(measure(x, Scheme(4)).scale)
    assert equal(weighted, observed(lambda s: SquaredErrorObserver(s, gamma=3.0), Scheme(4), x).encoding())


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_percentile_leaves_that_many_values_outside_within_a_bin(percentile, granularity):
    x = gaussian(3, 5000) + 0.2
    observer = observed(lambda s: PercentileObserver(s, percentile), Scheme(8, False, granularity), x)
    encoding = observer.encoding()
    rows = rows_of_groups(x, observer.scheme).numpy()
    outside = int(rows.shape[1] * (1 - percentile / 100))
    low, high = (np.sort(rows, axis=1)[:, i] for i in (outside, -1 - outside))
    bin_width = 2.0 ** float(observer.histogram.exponent.max()) / 4096
    assert encoding.scale.flatten().numpy() * 255 == pytest.approx(high - low, abs=2 * bin_width)


def test_the_hundredth_percentile_is_minmax():
    x = gaussian(4, 100)
    for scheme in (Scheme(8, False), Scheme(4, True, PerChannel(0))):
        assert equal(observed(lambda s: PercentileObserver(s, 100), scheme, x).encoding(), measure(x, scheme))


def test_a_percentile_leaves_outliers_outside():
    x = torch.cat([gaussian(100000), torch.tensor([1000.0])])
    encoding = observed(lambda s: PercentileObserver(s, 99.9), Scheme(8, False), x).encoding()
    assert float(encoding.scale) * 255 < 10


def test_moving_average_by_hand():
    observer = observed(lambda s: MovingAverageObserver(s, 0.5), Scheme(8, False), torch.tensor([-1.0, 1.0]), torch.tensor([-2.0, 4.0]))
    assert float(observer.high) == pytest.approx((0.25 * 1 + 0.5 * 4) / 0.75)
    assert float(observer.low) == pytest.approx(-(0.25 * 1 + 0.5 * 2) / 0.75)
    same = observed(MovingAverageObserver, Scheme(8, False), *[torch.tensor([-3.0, 5.0])] * 3)
    assert equal(same.encoding(), measure(torch.tensor([-3.0, 5.0]), Scheme(8, False)))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("bitwidth", [3, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
def test_all_zero_and_one_value(kind, bitwidth, symmetric, granularity):
    scheme = Scheme(bitwidth, symmetric, granularity)
    zero = torch.zeros(2, 4)
    assert equal(observed(kind, scheme, zero, zero).encoding(), measure(zero, scheme))
    for value in (0.75, -0.75, 1e-30, -1e30):
        x = torch.full((2, 4), value)
        encoding = observed(kind, scheme, x).encoding()
        assert ((encoding.fake_quantize(x) - x).abs().flatten() <= 0.51 * encoding.scale.max()).all()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(kind, bad):
    observer = observed(kind, Scheme(8), torch.tensor([1.0, 2.0]), torch.tensor([bad, 1.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(CalibrationError, match="the observed range is not finite"):
        observer.encoding()


@pytest.mark.parametrize("kind", EVERY)
def test_no_data_is_refused(kind):
    with pytest.raises(CalibrationError, match="no data was observed"):
        kind(Scheme(8)).encoding()
    with pytest.raises(CalibrationError, match="holds no values to measure"):
        kind(Scheme(8)).update(torch.empty(0))


@pytest.mark.parametrize("kind", EVERY)
def test_what_does_not_fit_together_is_not_merged(kind):
    observer = observed(kind, Scheme(8), torch.ones(3))
    with pytest.raises(CalibrationError, match="an observer of int4 symmetric per tensor cannot be merged into one of int8"):
        observer.merge(kind(Scheme(4)))
    expected = "a moving average is merged with one of the same momentum only" if kind is MovingAverageObserver else "a MinMaxObserver cannot be merged into a"
    with pytest.raises(CalibrationError, match=expected):
        observer.merge(observed(MinMaxObserver, Scheme(8), torch.ones(3)))
    by_channel = [observed(kind, Scheme(8, granularity=PerChannel(0)), torch.ones(n, 2)) for n in (3, 4)]
    with pytest.raises(CalibrationError, match=r"\[4\] ranges were observed where there were \[3\] before"):
        by_channel[0].merge(by_channel[1])


@pytest.mark.parametrize(("kind", "option"), [(PercentileObserver, 50), (PercentileObserver, 101), (MovingAverageObserver, 0), (MovingAverageObserver, 1.5)])
def test_impossible_options_are_refused(kind, option):
    with pytest.raises(CalibrationError, match=rf"(percentile|momentum) {option} is not in "):
        kind(Scheme(8), option)
