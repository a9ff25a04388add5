"""Which values an observer keeps, and how two observers merge."""

import pytest
import torch
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.activation_ranges import VALUES, VALUES_A_BATCH, RangeObserver


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def observed(batches: list[Tensor]) -> RangeObserver:
    observer = RangeObserver(True)
    for x in batches:
        observer.update(x)
    return observer


def test_a_sample_is_small_and_every_value_had_the_same_chance() -> None:
    observer = RangeObserver(True)
    for i in range(60):
        observer.update(torch.arange(64.0).expand(3, 120, 64) + 1000 * i)
        assert len(observer.sample) <= VALUES
        assert observer.tails.shape[1] <= 2**11
    observer.update(torch.empty(0, 64))
    assert (observer.batches, observer.count) == (60, 60 * 3 * 120 * 64)
    of_batch = torch.bincount((observer.sample / 1000).long(), minlength=60) / len(observer.sample)
    assert float(of_batch.max()) < 3 / 60
    assert float(of_batch[:30].sum()) == pytest.approx(0.5, abs=0.06)
    of_column = torch.bincount((observer.sample % 1000).long(), minlength=64) / len(observer.sample)
    assert float((of_column - 1 / 64).abs().max()) < 0.5 / 64


@pytest.mark.parametrize("shape", [(30_000,), (2, 20_000), (1, 4, 500, 500), (50, 3, 7, 100), ()])
def test_one_batch_gives_no_more_than_its_share(shape: tuple[int, ...]) -> None:
    observer = observed([torch.randn(shape)])
    assert len(observer.sample) <= VALUES_A_BATCH
    assert observer.is_complete == (observer.count <= VALUES_A_BATCH)
    if not observer.is_complete:
        assert len(observer.sample) > VALUES_A_BATCH / 8


@pytest.mark.parametrize("shape", [(1, 400, 64), (2, 300_000), (4000, 5, 2, 3), (200_000,)])
def test_a_batch_after_a_short_one_gives_no_more_than_its_share(shape: tuple[int, ...]) -> None:
    observer = observed([torch.randn(1, 2, shape[-1] % 100 + 1)])
    assert observer.is_complete
    most = 0
    for i in range(1, 41):
        before = observer.count
        observer.update(torch.randn(shape) + 100 * i)
        most = max(most, int(((observer.sample - 100 * i).abs() < 50).sum()))
        assert len(observer.sample) <= VALUES
        assert observer.count == before + torch.Size(shape).numel()
    assert VALUES_A_BATCH / 8 < most <= VALUES_A_BATCH
    stride = observer.row_stride * observer.column_stride
    assert len(observer.sample) == pytest.approx(observer.count / stride, rel=0.2)
    of_batch = torch.bincount((observer.sample / 100).round().long(), minlength=41)[1:]
    assert float(of_batch[:20].sum() / len(observer.sample)) == pytest.approx(0.5, abs=0.1)


def test_a_sample_does_not_depend_on_how_values_lie_in_memory() -> None:
    batches = [torch.randn(3, 70, 4, 80) for _ in range(3)]
    turned = [x.transpose(1, 2) for x in batches]
    assert not turned[0].is_contiguous()
    plain = observed([x.contiguous() for x in turned])
    assert torch.equal(observed(turned).sample, plain.sample)


def test_tails_hold_what_lies_beyond_their_bounds() -> None:
    batches = [torch.randn(4, 300, 80) for _ in range(40)]
    for x in batches:
        x[1, 7, :60] = 30 + torch.randn(60)  # one row far out
    observer, every = observed(batches), torch.cat(batches).flatten()
    for tail, values, bound in zip(observer.tails, (-every, every), observer.bounds, strict=True):
        found, expected = tail[tail >= bound], values[values >= bound]
        assert float(found.max()) == float(expected.max())
        assert 0.98 * len(expected) < len(found) <= len(expected)
        assert len(found) > 500


def test_halves_merge() -> None:
    batches = [torch.randn(2, 100, 200) * (1 + i) for i in range(8)]
    whole, first, second = observed(batches), observed(batches[:6]), observed(batches[6:])
    assert first.row_stride * first.column_stride > second.row_stride * second.column_stride
    restored = second.to(torch.device("cpu"))
    for one, other in ((first, restored), (observed(batches[6:]), observed(batches[:6]))):
        one.merge(other)
        assert (one.batches, one.count) == (whole.batches, whole.count)
        assert torch.equal(one.ends.sort(0).values, whole.ends.sort(0).values)
        bounds = torch.maximum(one.bounds, whole.bounds)
        for side in (0, 1):
            far = [o.tails[side][o.tails[side] >= bounds[side]].sort().values for o in (one, whole)]
            assert torch.equal(*far)
            assert len(far[0]) > 50
        stride = one.row_stride * one.column_stride
        assert len(one.sample) == pytest.approx(one.count / stride, rel=0.1)
        exact = float(torch.cat(batches).square().mean())
        assert float(one.sample.square().mean()) == pytest.approx(exact, rel=0.1)
    few = [torch.randn(10, 10) for _ in range(4)]
    left, right = observed(few[:2]), observed(few[2:])
    left.merge(right)
    assert torch.equal(left.sample, torch.cat(few).flatten())
    left.merge(RangeObserver(False))  # saw nothing
    ends_only = RangeObserver(False)
    ends_only.update(few[0])
    with pytest.raises(CalibrationError, match="observed without a sample"):
        left.merge(ends_only)
