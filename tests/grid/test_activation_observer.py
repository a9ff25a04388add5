"""What an observer keeps of all values: exact ends, and the bin of every value."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from grid.strategies import thorough
from qwlora.errors import CalibrationError
from qwlora.grid.activation_ranges import RangeObserver, estimate_ranges
from qwlora.grid.scheme import RangeEstimator, Scheme

BIN = 2.0**-8  # how far a value may be from the number of its bin, relative
SUBNORMAL = float(torch.finfo(torch.bfloat16).smallest_normal)


def observed(batches: list[Tensor]) -> RangeObserver:
    observer = RangeObserver(True)
    for x in batches:
        observer.update(x)
    return observer


def state(observer: RangeObserver) -> list[object]:
    tensors = (observer.low, observer.high, observer.patterns, observer.counts)
    return [observer.batches, *(None if t is None else t.tolist() for t in tensors)]


lists = hnp.arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.one_of(
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, -0.0]),
    ),
).map(torch.from_numpy)


@thorough
@given(lists, st.sampled_from([50.1, 60.0, 95.0, 99.99, 100.0]))
@example(torch.tensor([1.001, 1.002, 1.003]), 100.0)
@example(torch.tensor([-0.0, 0.0, 1e-45]), 60.0)
@example(torch.cat([torch.full((999,), 1e-20), torch.ones(1)]), 99.0)
def test_a_percentile_is_that_of_all_values_within_half_a_bin(x: Tensor, percentile: float) -> None:
    estimator = RangeEstimator("percentile", percentile)
    low, high = estimate_ranges([observed([x])], Scheme(16, False), estimator)
    ascending = x.double().sort().values
    outside = math.floor(len(x) * (100 - percentile) / 100 + 1e-9)
    for end, exact in ((low, ascending[outside]), (high, ascending[-1 - outside])):
        if outside == 0:
            assert float(end) == float(exact)
        assert float(end) == pytest.approx(float(exact), rel=BIN, abs=SUBNORMAL)


@thorough
@given(st.lists(lists, min_size=1, max_size=4), st.randoms())
def test_order_and_merging_change_no_bit(batches: list[Tensor], random) -> None:
    whole = observed(batches)
    assert int(whole.counts.sum()) == sum(map(len, batches))
    assert float(whole.low) == min(float(x.min()) for x in batches)  # type: ignore[arg-type]
    assert float(whole.high) == max(float(x.max()) for x in batches)  # type: ignore[arg-type]
    random.shuffle(batches)
    parts = [observed([x]).to(torch.device("cpu")) for x in batches]
    together = RangeObserver(True)
    for part in [RangeObserver(True), *parts]:
        before = state(part)
        together.merge(part)
        assert state(part) == before
    assert state(together) == state(observed(batches)) == state(whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_layouts_are_observed_like_their_float32_values(
    dtype: torch.dtype,
) -> None:
    x = (torch.randn(3, 7, 20, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    expected = state(observed([x.float().contiguous()]))
    for same in (x, x.mT, x.transpose(0, 1).requires_grad_(), torch.stack([x, x], -1)[..., 0]):
        assert state(observed([same])) == expected


def test_batches_and_bins_are_as_many_as_needed() -> None:
    assert state(observed([torch.empty(0, 64)])) == [0, None, None, [], []]
    assert state(observed([torch.tensor(0.3)]))[:1] == [1]
    generator = torch.Generator().manual_seed(0)
    observer = observed([torch.randn(64, 500, generator=generator) for _ in range(40)])
    assert observer.patterns.nbytes + observer.counts.nbytes < 60_000  # of 5 MB of data
    ends, whole = RangeObserver(False), observed([torch.zeros(2)])
    ends.update(torch.ones(3))
    with pytest.raises(CalibrationError, match="an observer without a histogram"):
        whole.merge(ends)
    ends.merge(whole)
    assert (ends.batches, float(ends.low or 0), float(ends.high or 0)) == (2, 0.0, 1.0)
