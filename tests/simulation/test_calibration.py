"""Calibration of a captured graph: in two halves, over processes, with other schemes, and what it reports."""

from typing import Any

import pytest
import torch
from torch import Tensor

from qwlora import PlacementRule, RangeEstimator, Scheme, Schemes
from qwlora.errors import CalibrationError, CaptureError
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.value_traits import Decision
from qwlora.grid.activation_ranges import RangeObserver
from qwlora.grid.scheme import ESTIMATORS, PerChannel
from qwlora.simulation.fake_quantizer import Mode, Quantizer, estimate_encodings
from qwlora.simulation.simulation import Simulation, tokens_of
from simulation.captured import adapted, batch, simulation

BATCHES = [batch(seed=s) for s in range(4)]
IDS = BATCHES[0]["input_ids"]


def encodings(made: Simulation) -> dict[str, tuple[float, int, int]]:
    found = [(name, q.encoding) for name, q in made.quantizers.items() if q.encoding is not None]
    return {name: (float(e.scale), int(e.offset), e.scheme.bitwidth) for name, e in found}


@pytest.fixture(scope="module")
def whole() -> Simulation:
    made = simulation()
    made.calibrate(BATCHES)
    return made


def test_observing_goes_on_and_freezing_fixes(whole: Simulation) -> None:
    made = simulation()
    made.observe(BATCHES[:1])
    made.freeze()
    early = encodings(made)
    made.observe(iter(BATCHES[1:]))
    report = made.freeze()
    assert encodings(made) == encodings(whole) != early
    assert (report.tokens, report.batches) == (4 * 32, 4)
    assert torch.equal(made.logits(IDS), whole.logits(IDS))


def states(made: Simulation) -> list[Any]:
    """All that observing and freezing change."""
    found: list[Any] = [encodings(made), made._tokens, made._batches, *made.placement.values]
    for quantizer in made.quantizers.values():
        observer = quantizer.observer
        tensors = (observer.low, observer.high, observer.patterns, observer.counts)
        found += [quantizer.mode, observer.batches]
        found += [None if t is None else t.tolist() for t in tensors]
    return found


def broken(kind: type[BaseException]) -> Any:
    """Two batches, then an exception while the third runs."""
    yield from BATCHES[:2]
    raise kind("stop")


WRONG_IDS = {**BATCHES[1], "input_ids": BATCHES[1]["input_ids"] + 10_000}


@pytest.mark.parametrize("observer", ["min-max", "sqnr"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["observed", "frozen"])
@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (lambda: broken(RuntimeError), RuntimeError),
        (lambda: broken(KeyboardInterrupt), KeyboardInterrupt),
        (lambda: [BATCHES[1], WRONG_IDS], CalibrationError),
        (lambda: [BATCHES[1], {"ids": IDS}], CaptureError),
        (lambda: [BATCHES[1], None], Exception),
        (list, CalibrationError),
        (lambda: iter(()), CalibrationError),
    ],
    ids=["error", "Ctrl-C", "ids", "names", "type", "none", "none of a generator"],
)
def test_a_failed_observation_changes_nothing(
    observer: str, is_frozen: bool, batches: Any, error: type[BaseException]
) -> None:
    made = simulation(Schemes(observer=observer))
    made.observe(BATCHES[:1])
    if is_frozen:
        made.freeze()
    before = states(made)
    for call in (made.observe, made.calibrate):
        with pytest.raises(error):
            call(batches())
        assert states(made) == before


def out_of_memory(*_: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("hook", "error", "message"),
    [
        (out_of_memory, MemoryError, None),
        (lambda _, x: (x[0] * torch.nan,), CalibrationError, "mul, .*observed range is not finite"),
    ],
    ids=["an exception", "NaN"],
)
def test_what_fails_inside_the_graph_changes_nothing(
    hook: Any, error: type[Exception], message: str | None, whole: Simulation
) -> None:
    made = simulation()
    handle = made.quantizers["model.layers.0.mlp.mul"].register_forward_pre_hook(hook)
    before = states(made)
    with pytest.raises(error, match=message):
        made.calibrate(BATCHES)
    assert states(made) == before
    handle.remove()
    assert made.calibrate(BATCHES).batches == 4
    assert encodings(made) == encodings(whole)


def test_an_estimator_that_needs_more_than_was_observed_can_observe_again(
    whole: Simulation,
) -> None:
    made, direct = simulation(), simulation(Schemes(observer="sqnr"))
    made.observe(BATCHES[:2])
    for quantizer in made.quantizers.values():
        quantizer.estimator = RangeEstimator("sqnr")
    with pytest.raises(
        CalibrationError, match=r"was observed without a histogram.* sqnr.*Observe again"
    ):
        made.freeze()
    made.calibrate(BATCHES)
    direct.calibrate(BATCHES)
    assert encodings(made) == encodings(direct) != encodings(whole)


@pytest.mark.parametrize("observer", ESTIMATORS)
def test_every_observer_gives_every_activation_an_encoding(observer: str) -> None:
    estimator = RangeEstimator(observer, percentile=99.0)
    made = simulation(Schemes(Scheme(8, symmetric=False), observer=estimator))
    made.calibrate(BATCHES)
    assert encodings(made).keys() == made.quantizers.keys()
    for name, quantizer in made.quantizers.items():
        scale, offset, _ = encodings(made)[name]
        low, high = float(quantizer.observer.low or 0), float(quantizer.observer.high or 0)
        if quantizer.is_constant:
            assert (low, high, offset) == (0, 0, 0)
            continue
        assert scale * (offset + 255) <= max(high, 0) + 2 * scale
        assert scale * offset >= min(low, 0) - 2 * scale
    up = made.quantizers["model.layers.0.mlp.up_proj.linear"]
    width = float(up.observer.high or 0) - float(up.observer.low or 0)
    is_whole = encodings(made)[up.name][0] * 255 == pytest.approx(width, rel=1e-5)
    assert is_whole is (observer == "min-max")


def test_the_unit_is_tokens() -> None:
    made = simulation()
    report = made.calibrate(BATCHES, tokens=33)
    assert (report.tokens, report.batches) == (64, 2)
    padded = batch()
    padded["attention_mask"][0, :5] = 0
    assert made.calibrate([padded]).tokens == 64 + 27
    assert tokens_of({"pixel_values": torch.zeros(3, 2, 8, 8)}) == 3
    assert tokens_of({"input_ids": torch.zeros(2, 7)}) == 14


def test_another_scheme_needs_no_data() -> None:
    rule = PlacementRule("*.mlp.*", bitwidth=8, symmetric=True)
    made, direct = simulation(), simulation(Schemes(rules=[rule]))
    made.calibrate(BATCHES)
    direct.calibrate(BATCHES)
    before = encodings(made)
    changed = [name for name in made.quantizers if ".mlp." in name]
    for name in changed:
        made.quantizers[name].scheme = Scheme(8)
    # gate, up; the activation; down with its adapter; the product
    assert len(changed) == 2 * (2 + 1 + 5 + 1)
    with pytest.raises(CalibrationError, match=r"model.layers.0.mlp.* has no encoding yet.*freeze"):
        made.logits(IDS)
    made.freeze()
    assert encodings(made) == encodings(direct)
    assert {name for name, e in encodings(made).items() if e != before[name]} == set(changed)


def test_quantizers_can_be_switched_off(whole: Simulation) -> None:
    with torch.no_grad(), visible_implementations(adapted()):
        plain = adapted()(**BATCHES[0], use_cache=False).logits
    simulated = whole.logits(IDS)
    with whole.only():
        assert torch.equal(whole.logits(IDS), plain)
    with whole.only("*"):
        assert torch.equal(whole.logits(IDS), simulated)
    with whole.only("*.1.mlp.*", "*.lora_?.weight"):
        for modules, part in ((whole.quantizers, ".1.mlp."), (whole.weights, "lora")):
            on = {name for name, module in modules.items() if module.mode is Mode.SIMULATE}
            assert on == {name for name in modules if part in name}
        some = whole.logits(IDS)
    assert not torch.equal(some, plain)
    assert not torch.equal(some, simulated)
    assert torch.equal(whole.logits(IDS), simulated)
    with pytest.raises(CalibrationError, match="matches no quantized"), whole.only("*.nothing"):
        pass


def test_constants_and_what_saw_nothing_are_named(whole: Simulation) -> None:
    made = simulation()
    made.observe(BATCHES)
    name = "model.layers.0.mlp.mul"
    made.quantizers[name].observer = RangeObserver(False)  # as of an expert that no token chose
    with pytest.raises(CalibrationError, match=f"1 activations saw no data: {name}.* other bat"):
        made.freeze()
    report = made.freeze(allow_unseen=True)
    assert report.unseen == (name,)
    layer = "model.layers.0.self_attn.v_proj"
    assert report.constants == (f"{layer}.lora_B.linear", f"{layer}.mul")
    assert name not in made.encodings
    (placed,) = (p for p in made.placement.values if p.name == name)
    assert (placed.decision, placed.reason) == (Decision.FLOAT, "no calibration data reached it")


def test_writing_in_place_changes_no_bit(whole: Simulation) -> None:
    expected = whole.logits(IDS)
    assert all(quantizer.in_place for quantizer in whole.quantizers.values())
    values: dict[str, Tensor] = whole.values(IDS)
    for quantizer in whole.quantizers.values():
        quantizer.in_place = False
    assert torch.equal(whole.logits(IDS), expected)
    found = whole.values(IDS)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    for quantizer in whole.quantizers.values():
        quantizer.in_place = True


def test_an_activation_has_one_integer_grid() -> None:
    for scheme in (Scheme(8, granularity=PerChannel(0)), Scheme(4, False, float_offset=True)):
        with pytest.raises(CalibrationError, match=r"it: activations need a per-tensor .*not int"):
            Quantizer("it", scheme)
    quantizer = Quantizer("it", Scheme(8, symmetric=False))
    quantizer.observer.update(torch.tensor([3e38, -3e38]))
    with pytest.raises(CalibrationError, match="it: the observed range is not finite, or"):
        estimate_encodings([quantizer])


def test_in_place_is_the_same_and_only_where_no_gradient_is() -> None:
    quantizer = Quantizer("it", Scheme(8, symmetric=False), in_place=True)
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
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
