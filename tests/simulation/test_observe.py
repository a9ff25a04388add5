"""What quantizers remember, and the encodings that come of it, against the grid's observers on all of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwlora.errors import CalibrationError
from qwlora.grid.encoding import Encoding
from qwlora.grid.observers import MinMaxObserver
from qwlora.grid.robust_observers import (
    MovingAverageObserver,
    PercentileObserver,
    SqnrObserver,
    SquaredErrorObserver,
)
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.simulation.activation_observer import VALUES, VALUES_A_BATCH, SampleObserver
from qwlora.simulation.estimate_encodings import estimate
from qwlora.simulation.fake_quantizer import Mode, Quantizer
from qwlora.simulation.observer_kind import Estimator

GRID: dict[str, Callable[[Scheme], MinMaxObserver]] = {
    "min-max": MinMaxObserver,
    "percentile": lambda scheme: PercentileObserver(scheme, 99.9),
    "squared-error": SquaredErrorObserver,
    "sqnr": SqnrObserver,
    "moving-average": lambda scheme: MovingAverageObserver(scheme, 0.3),
}
ESTIMATORS = {name: Estimator(name, percentile=99.9, momentum=0.3) for name in GRID}
SHAPE = (2, 96, 384)
DATA: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(SHAPE),
    "heavy": lambda: torch.distributions.StudentT(3.0).sample(SHAPE),
    "softmax": lambda: (3 * torch.randn(SHAPE)).softmax(-1),
    "relu": lambda: torch.randn(SHAPE).relu(),
    "channels": lambda: torch.randn(SHAPE) * torch.linspace(-3, 3, SHAPE[-1]).exp(),
    "rows far out beside one value": lambda: far_rows(),
    "massive": lambda: torch.where(
        (torch.arange(96) == 3).unsqueeze(1) & (torch.arange(384) < 40), 50.0, torch.randn(SHAPE)
    ),
}


def far_rows() -> Tensor:
    """One value reaches three times as far as most rows, and a few rows, of many values, nearly twice."""
    x = torch.rand(SHAPE) * 2 - 1
    x.view(-1, SHAPE[-1])[torch.randperm(192)[:7], :256] = 1.9
    x.view(-1)[int(torch.randint(x.numel(), ()))] = 3.0
    return x


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def encoding_of(batches: list[Tensor], scheme: Scheme, estimator: Estimator) -> Encoding:
    quantizer = Quantizer("it", scheme, estimator)
    for x in batches:
        quantizer.observer.update(x)
    estimate([quantizer])
    assert quantizer.encoding is not None
    return quantizer.encoding


def observed(batches: list[Tensor]) -> SampleObserver:
    observer = SampleObserver(True)
    for x in batches:
        observer.update(x)
    return observer


def error(encoding: Encoding, x: Tensor, gamma: float = 1.0) -> float:
    squared = (encoding.fake_quantize(x) - x).square()
    low, high = (
        float(encoding.scale * (encoding.offset + steps))
        for steps in (-0.5, encoding.scheme.steps + 0.5)
    )
    return float((squared * torch.where((x < low) | (x > high), gamma, 1.0)).sum())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["min-max", "moving-average"])
def test_ends_are_exact(name: str, symmetric: bool) -> None:
    batches = [torch.randn(3, 40, 64) * (i + 1) for i in range(5)]
    scheme = Scheme(8, symmetric)
    grid = GRID[name](scheme)
    for x in batches:
        grid.update(x)
    found, expected = encoding_of(batches, scheme, ESTIMATORS[name]), grid.encoding()
    torch.testing.assert_close(
        found.scale, expected.scale, rtol=0 if name == "min-max" else 1e-6, atol=0
    )
    assert torch.equal(found.offset, expected.offset)


@pytest.mark.parametrize("shape", [(16,), (5, 30), (1, 4, 8, 9)])
def test_where_all_values_fit_percentiles_are_the_grids(shape: tuple[int, ...]) -> None:
    batches = [torch.randn(shape) for _ in range(4)]
    for percentile in (60.0, 95.0, 99.9, 100.0):
        grid = PercentileObserver(Scheme(8, symmetric=False), percentile)
        for x in batches:
            grid.update(x)
        found = encoding_of(batches, grid.scheme, Estimator("percentile", percentile))
        assert torch.equal(found.scale, grid.encoding().scale)
        assert torch.equal(found.offset, grid.encoding().offset)


@pytest.mark.parametrize("data", list(DATA))
@pytest.mark.parametrize(
    ("bitwidth", "symmetric"), [(4, False), (4, True), (8, False), (8, True), (16, False)]
)
def test_least_errors_are_near_those_of_a_search_over_all_data(
    data: str, bitwidth: int, symmetric: bool
) -> None:
    batches = [DATA[data]() for _ in range(3)]
    x, scheme = torch.cat(batches), Scheme(bitwidth, symmetric)
    for name, gamma in (("squared-error", 1.0), ("sqnr", 3.0)):
        grid = GRID[name](scheme)
        grid.update(x)
        found = error(encoding_of(batches, scheme, ESTIMATORS[name]), x, gamma)
        assert found <= 1.15 * error(grid.encoding(), x, gamma)


def test_clipping_pays_where_a_few_values_lie_far_out() -> None:
    batches = [DATA["heavy"]() for _ in range(3)]
    x, scheme = torch.cat(batches), Scheme(4, symmetric=False)
    errors = {
        name: error(encoding_of(batches, scheme, estimator), x)
        for name, estimator in ESTIMATORS.items()
    }
    assert errors["squared-error"] < errors["percentile"] < errors["min-max"] / 2


def test_percentiles_of_a_sample_are_near_those_of_all() -> None:
    batches = [DATA["heavy"]() for _ in range(4)]
    x = torch.cat(batches)
    for percentile in (99.0, 99.9, 99.99):
        found = encoding_of(
            batches, Scheme(16, symmetric=False), Estimator("percentile", percentile)
        )
        outside = float((x > float(found.scale * (found.offset + 65535))).float().mean())
        assert outside == pytest.approx(1 - percentile / 100, rel=0.25)


def test_a_sample_is_small_and_every_value_had_the_same_chance() -> None:
    observer = SampleObserver(True)
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
        most = max(
            most, int(((observer.sample > 100 * i - 50) & (observer.sample < 100 * i + 50)).sum())
        )
        assert len(observer.sample) <= VALUES
        assert observer.count == before + torch.Size(shape).numel()
    assert VALUES_A_BATCH / 8 < most <= VALUES_A_BATCH
    stride = observer.row_stride * observer.column_stride
    assert len(observer.sample) == pytest.approx(observer.count / stride, rel=0.2)
    of_batch = torch.bincount((observer.sample / 100).round().long(), minlength=41)[1:] / len(
        observer.sample
    )
    assert float(of_batch[:20].sum()) == pytest.approx(0.5, abs=0.1)


def test_a_sample_does_not_depend_on_how_values_lie_in_memory() -> None:
    batches = [torch.randn(3, 70, 4, 80) for _ in range(3)]
    turned = observed([x.transpose(1, 2) for x in batches])
    assert not batches[0].transpose(1, 2).is_contiguous()
    assert torch.equal(
        turned.sample, observed([x.transpose(1, 2).contiguous() for x in batches]).sample
    )


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


def test_halves_merge(tmp_path: Path) -> None:
    batches = [torch.randn(2, 100, 200) * (1 + i) for i in range(8)]
    whole, first, second = observed(batches), observed(batches[:6]), observed(batches[6:])
    assert first.row_stride * first.column_stride > second.row_stride * second.column_stride
    save_file(second.to_tensors(), tmp_path / "second.safetensors")
    restored = SampleObserver.from_tensors(load_file(tmp_path / "second.safetensors"))
    for one, other in ((first, restored), (observed(batches[6:]), observed(batches[:6]))):
        one.merge(other)
        assert (one.batches, one.count) == (whole.batches, whole.count)
        assert torch.equal(one.ends.sort(0).values, whole.ends.sort(0).values)
        bounds = torch.maximum(one.bounds, whole.bounds)
        for side in (0, 1):
            far = [o.tails[side][o.tails[side] >= bounds[side]].sort().values for o in (one, whole)]
            assert torch.equal(*far)
            assert len(far[0]) > 50
        assert len(one.sample) == pytest.approx(
            one.count / (one.row_stride * one.column_stride), rel=0.1
        )
        assert float(one.sample.square().mean()) == pytest.approx(
            float(torch.cat(batches).square().mean()), rel=0.1
        )
    few = [torch.randn(10, 10) for _ in range(4)]
    left, right = observed(few[:2]), observed(few[2:])
    left.merge(right)
    assert torch.equal(left.sample, torch.cat(few).flatten())
    left.merge(SampleObserver(False))  # saw nothing
    ends_only = SampleObserver(False)
    ends_only.update(few[0])
    with pytest.raises(
        CalibrationError, match="observed without a sample, which this observer needs"
    ):
        left.merge(ends_only)


def test_quantizer_says_what_it_cannot_do() -> None:
    for scheme in (Scheme(8, granularity=PerChannel(0)), Scheme(4, False, float_offset=True)):
        with pytest.raises(
            CalibrationError, match="it: an activation has one scale and an integer offset, not int"
        ):
            Quantizer("it", scheme)
    quantizer = Quantizer("it", Scheme(8))
    quantizer.mode = Mode.SIMULATE
    with pytest.raises(CalibrationError, match="it has no encoding; call freeze"):
        quantizer(torch.ones(2))
    quantizer.observer.update(torch.ones(2))
    quantizer.estimator = Estimator("sqnr")
    with pytest.raises(
        CalibrationError, match="observer sqnr needs a sample, and it was observed without one"
    ):
        estimate([quantizer])
    for bad, message in (
        (torch.nan, r"not finite \(nan or infinity in the data\)"),
        (3e38, "wider than float32 can hold; look for values that are masks"),
    ):
        quantizer = Quantizer("it", Scheme(8, symmetric=False))
        quantizer.observer.update(torch.tensor([bad, -bad]))
        with pytest.raises(CalibrationError, match=f"it: the observed range is {message}"):
            estimate([quantizer])
    with pytest.raises(CalibrationError, match=r"percentile 50 is not in \(50, 100\]"):
        Estimator("percentile", 50)
    with pytest.raises(CalibrationError, match=r"momentum 0 is not in \(0, 1\]"):
        Estimator(momentum=0)


def test_in_place_is_the_same_and_only_where_no_gradient_is() -> None:
    quantizer = Quantizer("it", Scheme(8, symmetric=False), in_place=True)
    x = torch.randn(3, 50)
    quantizer.observer.update(x)
    estimate([quantizer])
    assert quantizer.encoding is not None
    quantizer.mode, expected = Mode.SIMULATE, quantizer.encoding.fake_quantize(x)
    learning = x.clone().requires_grad_()
    assert torch.equal(quantizer(learning), expected)
    assert torch.equal(learning, x)
    for given in (x.clone(), x.half()):
        expected = quantizer.encoding.fake_quantize(given)
        assert quantizer(given) is given
        assert torch.equal(given, expected)
