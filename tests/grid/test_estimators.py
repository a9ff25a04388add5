from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwlora.errors import CalibrationError
from qwlora.grid.merging_histogram import Histogram
from qwlora.grid.observers import MinMaxObserver, measure, search
from qwlora.grid.robust_observers import (
    DistributionObserver,
    MovingAverageObserver,
    PercentileObserver,
    SqnrObserver,
    SquaredErrorObserver,
    rows_of_groups,
)
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme
from qwlora.grid.value_distribution import Distribution, _share

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
        width = 2.0 ** float(histogram.exponent[row]) / histogram.half
        assert ((centres - x[row].sort().values).abs() <= width * 1.00001).all()
        assert width <= max(float(x[row].abs().max()), 2.0**-100) / (histogram.half / 2 - 1)


def counted(x, groups=1):
    histogram = Histogram(groups, x.device)
    histogram.update(x.reshape(groups, -1), x.reshape(groups, -1).abs().amax(1))
    return histogram


@brief
@given(
    cases(bitwidths=(4,)),
    st.lists(st.just(0.0) | st.floats(1e-6, 1e6), min_size=2, max_size=4),
    st.randoms(),
)
def test_counts_do_not_depend_on_order_or_division(case, factors, random):
    x, scheme = case
    batches = [rows_of_groups(x * f, scheme) for f in factors]
    whole = counted(torch.cat(batches, 1), len(batches[0]))
    random.shuffle(batches)
    first = counted(batches[0], len(batches[0]))
    for batch in batches[1:]:
        first.merge(counted(batch, len(batch)))
    assert torch.equal(first.exponent, whole.exponent)
    assert torch.equal(first.counts, whole.counts)


@pytest.mark.parametrize("groups", [2, 17])
def test_long_rows_are_counted_in_pieces(groups):
    x = gaussian(groups, 2**18 + 77)
    histogram = counted(x, groups)
    half = 32768 if groups == 2 else 4096
    assert histogram.half == half
    for row in range(groups):
        bins = (
            np.trunc(
                x[row].numpy().astype(np.float64) * half / 2.0 ** int(histogram.exponent[row])
            ).astype(int)
            + half
            - 1
        )
        assert np.array_equal(
            histogram.counts[row].numpy(), np.bincount(bins, minlength=2 * half - 1)
        )


def test_thousands_of_short_rows_are_counted_in_pieces():
    x = gaussian(3000, 2)
    histogram = counted(x, 3000)
    assert (histogram.counts.sum(1) == 2).all()
    assert float(histogram.counts[2999].nonzero()[0]) == float(
        torch.trunc(x[2999].min() * 4096 / 2.0 ** int(histogram.exponent[2999])) + 4095
    )


def test_exact_zeros_lie_in_the_centre_of_their_bin():
    histogram = Histogram(1, torch.device("cpu"))
    histogram.update(torch.tensor([[0.0, -0.0, 1.0]]), torch.tensor([1.0]))
    middle = histogram.half - 1
    assert int(histogram.counts[0, middle]) == 2
    assert float(histogram.centres()[0, middle]) == 0


@brief
@given(cases(), st.sampled_from(EVERY), st.floats(0.1, 10), st.sampled_from([0, 5, 12, 10**6]))
def test_merge_of_two_streams_is_the_whole(case, kind, factor, most_kept):
    """Wherever the change from values to bins falls."""
    x, scheme = case
    batches = [x, x.flip(0) * factor, -x]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distribution, "most_kept", property(lambda self: most_kept))
        whole = observed(kind, scheme, *batches).encoding()
        for at in (1, 2):
            first, second = (
                observed(kind, scheme, *batches[:at]),
                observed(kind, scheme, *batches[at:]),
            )
            first.merge(second)
            merged = first.encoding()
            if kind is MovingAverageObserver:
                assert torch.allclose(merged.scale, whole.scale, rtol=1e-6)
            else:
                assert equal(merged, whole)
        empty = kind(scheme)
        empty.merge(observed(kind, scheme, *batches))
        assert equal(empty.encoding(), whole)


@pytest.mark.parametrize(("groups", "most"), [(1, 131070), (17, 16382)])
def test_values_are_kept_while_they_take_no_more_room_than_bins(groups, most):
    x = gaussian(groups, most)
    observer = observed(
        DistributionObserver, Scheme(8, granularity=PerChannel(0)), x[:, :-1], x[:, -1:]
    )
    assert observer.seen.kept == most
    assert observer.seen.histogram is None
    observer.update(x[:, :1])
    assert observer.seen.kept == 0
    assert torch.equal(
        observer.seen.histogram.counts, counted(torch.cat([x, x[:, :1]], 1), groups).counts
    )


def test_what_is_kept_is_a_copy():
    x = gaussian(4, 8)
    observer = observed(SqnrObserver, Scheme(4), x)
    before = observer.encoding()
    x.zero_()
    assert equal(observer.encoding(), before)


def exact_error(x, scale, offset, steps, gamma):
    """Written from the definition, in float64, one group."""
    x = x.double().flatten()
    steps_of_x = torch.round(x / scale)
    clipped = (steps_of_x < offset) | (steps_of_x > offset + steps)
    return float(
        (
            (steps_of_x.clamp(offset, offset + steps) * scale - x).square()
            * torch.where(clipped, gamma, 1.0)
        ).sum()
    )


def nets_least_error(x, scheme, gamma):
    """The least error among the grids that AIMET's analyzer tries, from its description."""
    low, high, steps = min(float(x.min()), 0.0), max(float(x.max()), 0.0), scheme.steps
    if scheme.symmetric:
        grids = [
            (2 * max(high, -low) / steps * k / 100, scheme.symmetric_offset) for k in range(1, 102)
        ]
    else:
        widest = (high - low) / steps
        observed_offset = round(low / widest)
        grids = []
        for k in range(1, 18):
            for o in [
                *{round(-steps + i * steps / min(steps, 19)) for i in range(min(steps, 19) + 1)},
                observed_offset,
            ]:
                first = max(k / 16 * widest * o, observed_offset * widest)
                last = min(k / 16 * widest * (o + steps), (observed_offset + steps) * widest)
                scale = (last - first) / steps
                grids += (
                    [(scale, min(0, max(-steps, round(first / scale))))] if scale > 1e-30 else []
                )
    return min(exact_error(x, scale, offset, steps, gamma) for scale, offset in grids)


DATA = {
    "normal": lambda: gaussian(600),
    "shifted": lambda: gaussian(600) + 1.5,
    "heavy tails": lambda: gaussian(600) ** 3,
    "positive": lambda: gaussian(600).clamp(min=0),
    "few integers": lambda: (2 * gaussian(600)).round(),
    "negative": lambda: -gaussian(600).abs() - 1,
}


@pytest.mark.parametrize("gamma", [1.0, 3.0])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("data", DATA)
def test_no_grid_of_aimets_net_is_better(data, bitwidth, symmetric, gamma):
    x, scheme = DATA[data](), Scheme(bitwidth, symmetric)
    encoding = observed(lambda s: SquaredErrorObserver(s, gamma), scheme, x).encoding()
    found = exact_error(x, float(encoding.scale), int(encoding.offset), scheme.steps, gamma)
    assert found <= nets_least_error(x, scheme, gamma) * (1 + 1e-6) + 1e-12


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bitwidth", "tolerance"), [(2, 5e-4), (4, 5e-4), (8, 5e-4), (16, 0.02)])
def test_bins_choose_almost_as_well_as_values(bitwidth, tolerance, symmetric):
    """At 16 bits the steps are as narrow as the bins, and only the values know where the roundings happen to cancel."""
    x, scheme = gaussian(100, 1000) + 0.3, Scheme(bitwidth, symmetric)
    exact = observed(SqnrObserver, scheme, x).encoding()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Distribution, "most_kept", property(lambda self: 0))
        binned = observed(SqnrObserver, scheme, x).encoding()
    errors = [
        exact_error(x, float(e.scale), int(e.offset), scheme.steps, 3.0) for e in (binned, exact)
    ]
    assert errors[0] <= errors[1] * (1 + tolerance)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerBlock(256)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
def test_squared_error_is_near_the_exact_search_and_below_minmax(bitwidth, symmetric, granularity):
    x = gaussian(8, 512) * (1 + torch.arange(8.0).unsqueeze(1)) + 0.3
    scheme = Scheme(bitwidth, symmetric, granularity)
    found, exact, minmax = (
        float((e.fake_quantize(x) - x).double().square().sum())
        for e in (
            observed(SquaredErrorObserver, scheme, x).encoding(),
            search(x, scheme),
            measure(x, scheme),
        )
    )
    assert found <= minmax
    assert found <= 1.02 * exact


def test_sqnr_clips_less_than_squared_error():
    x = gaussian(1, 10000)
    plain, weighted = (
        observed(kind, Scheme(4), x).encoding() for kind in (SquaredErrorObserver, SqnrObserver)
    )
    assert float(plain.scale) < float(weighted.scale) < float(measure(x, Scheme(4)).scale)
    assert equal(
        weighted, observed(lambda s: SquaredErrorObserver(s, gamma=3.0), Scheme(4), x).encoding()
    )


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)])
@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("binned", [False, True])
def test_a_percentile_is_that_of_the_data(percentile, granularity, binned):
    """Of the values themselves; of bins, their outer edges."""
    x = gaussian(3, 5000) + 0.2
    scheme = Scheme(8, False, granularity)
    with pytest.MonkeyPatch.context() as patch:
        if binned:
            patch.setattr(Distribution, "most_kept", property(lambda self: 0))
        seen = observed(lambda s: PercentileObserver(s, percentile), scheme, x).seen
    rows = rows_of_groups(x, scheme).numpy()
    outside = round(rows.shape[1] * (100 - percentile)) // 100
    low, high = (np.sort(rows, axis=1)[:, i] for i in (outside, -1 - outside))
    found_low, found_high = (bound.numpy() for bound in seen.percentile_range(percentile))
    if binned:
        width = seen.histogram.widths().numpy()
        assert (found_low <= low).all()
        assert (low <= found_low + width).all()
        assert (found_high >= high).all()
        assert (high >= found_high - width).all()
    else:
        assert np.array_equal(found_low, low)
        assert np.array_equal(found_high, high)


@pytest.mark.parametrize(
    ("count", "percentile", "outside"),
    [(1000, 99.9, 1), (100, 99, 1), (1000, 90, 100), (999, 99.9, 0), (10**9, 99.9999, 1000)],
)
def test_a_whole_share_is_whole(count, percentile, outside):
    assert _share(count, percentile) == outside


def test_the_hundredth_percentile_is_minmax():
    x = gaussian(4, 100)
    for scheme in (Scheme(8, False), Scheme(4, True, PerChannel(0))):
        assert equal(
            observed(lambda s: PercentileObserver(s, 100), scheme, x).encoding(), measure(x, scheme)
        )


def test_a_percentile_leaves_outliers_outside():
    x = torch.cat([gaussian(100000), torch.tensor([1000.0])])
    encoding = observed(lambda s: PercentileObserver(s, 99.9), Scheme(8, False), x).encoding()
    assert float(encoding.scale) * 255 < 10


def test_moving_average_by_hand():
    observer = observed(
        lambda s: MovingAverageObserver(s, 0.5),
        Scheme(8, False),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([-2.0, 4.0]),
    )
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
        assert (
            (encoding.fake_quantize(x) - x).abs().flatten() <= 0.51 * encoding.scale.max()
        ).all()


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused(kind, bad):
    observer = observed(
        kind,
        Scheme(8),
        torch.tensor([1.0, 2.0]),
        torch.tensor([bad, 1.0]),
        torch.tensor([1.0, 2.0]),
    )
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
    with pytest.raises(
        CalibrationError,
        match="an observer of int4 symmetric per tensor cannot be merged into one of int8",
    ):
        observer.merge(kind(Scheme(4)))
    expected = (
        "a moving average is merged with one of the same momentum only"
        if kind is MovingAverageObserver
        else "a MinMaxObserver cannot be merged into a"
    )
    with pytest.raises(CalibrationError, match=expected):
        observer.merge(observed(MinMaxObserver, Scheme(8), torch.ones(3)))
    by_channel = [
        observed(kind, Scheme(8, granularity=PerChannel(0)), torch.ones(n, 2)) for n in (3, 4)
    ]
    with pytest.raises(
        CalibrationError, match=r"\[4\] ranges were observed where there were \[3\] before"
    ):
        by_channel[0].merge(by_channel[1])


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        (PercentileObserver, 50),
        (PercentileObserver, 101),
        (MovingAverageObserver, 0),
        (MovingAverageObserver, 1.5),
    ],
)
def test_impossible_options_are_refused(kind, option):
    with pytest.raises(CalibrationError, match=rf"(percentile|momentum) {option} is not in "):
        kind(Scheme(8), option)
