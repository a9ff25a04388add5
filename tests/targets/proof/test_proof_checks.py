"""Every limit of a proof, on both sides: what passes, what does not, and what is no number."""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Binomial

from qwlora.data.sequences import IGNORED, Sequences
from qwlora.errors import SourceError
from qwlora.graph.quantized_graph import GraphValue, Kind
from qwlora.grid.encoding import sqnr_db
from qwlora.grid.scheme import Scheme
from qwlora.simulation.placement_rules import Schemes
from qwlora.system import strict_json
from qwlora.targets.proof.checks import (
    Check,
    Limits,
    Parity,
    at_least,
    at_most,
    is_so,
    only_finite,
    verdict,
)
from qwlora.targets.proof.compare import (
    DECODED,
    compare_cache,
    compare_layers,
    compare_outputs,
    output_check,
    switching,
)
from qwlora.targets.proof.prove import decoded
from qwlora.targets.proof.reference import (
    AGREEMENT,
    GRAPHS_NOISE,
    LOGIT_DIFFERENCE,
    NOISE,
    compare_logits,
    is_same,
    is_told_apart,
    largest,
    least_noise,
    logits_checks,
    lowest_agreement,
    make_reference,
    perplexity,
    perplexity_floor,
)
from targets.proof.toy_runtime import TableRuntime
from targets.proofs import measure_logits

NAN, INF = math.nan, math.inf
LIMITS = Limits(
    layer_steps=2.0, layer_mean_steps=0.5, perplexity_difference=0.25, sqnr=60.0, below_floor=6.0
)


@pytest.mark.parametrize(
    ("value", "limit", "is_at_most", "is_at_least"),
    [
        (1.0, 1.0, True, True),
        (1.01, 1.0, False, True),
        (0.99, 1.0, True, False),
        (0.0, 0.0, True, True),
        (NAN, 1.0, False, False),
        (INF, 1.0, False, True),  # nothing differs
        (-INF, 1.0, False, False),
        (1.0, NAN, False, False),
        (1.0, INF, False, False),
        (1.0, -INF, False, False),
    ],
)
def test_a_value_on_its_side_of_a_limit(
    value: float, limit: float, is_at_most: bool, is_at_least: bool
) -> None:
    checks = at_most("it", value, limit), at_least("it", value, limit)
    assert [check.passed for check in checks] == [is_at_most, is_at_least]
    for check, side in zip(checks, ("at most", "at least"), strict=True):
        assert check.value == (value if math.isfinite(value) else None)
        assert check.limit == (limit if math.isfinite(limit) else None)
        assert ("not finite" in check.sentence) == (None in (check.value, check.limit))
        assert side in check.sentence
        strict_json.dumps(asdict(check))


def test_a_check_is_read_as_it_was_written_and_nothing_else_is_a_number_or_passes() -> None:
    so, not_so, number = (
        is_so("it is", True),
        is_so("it is", False),
        at_most("it", 1.0, 2.0, "nats"),
    )
    assert (so.passed, so.limit, so.sentence) == (True, True, "it is: yes")
    assert (not_so.passed, not_so.limit, not_so.sentence) == (False, True, "it is: no")
    for check in (number, at_least("it", 3.0, 2.0), so, not_so):
        assert Check.from_json(asdict(check)) == check
    for key, other in itertools.product(("value", "limit"), (None, "1.0", [1.0], {})):
        assert getattr(Check.from_json({**asdict(number), key: other}), key) is None
    for passed in (None, "true", 1, False):
        assert not Check.from_json({**asdict(number), "passed": passed}).passed


def test_limits_are_those_that_are_documented() -> None:
    limits = Limits()
    assert (limits.layer_steps, limits.layer_mean_steps) == (2.0, 0.05)
    assert (limits.perplexity_difference, limits.sqnr, limits.below_floor) == (0.003, 60.0, 6.0)


GOOD, BAD = at_most("good", 1.0, 2.0), at_most("bad", 3.0, 2.0)


@pytest.mark.parametrize("checks", [[], [GOOD], [GOOD, GOOD], [GOOD, BAD, GOOD], [BAD, BAD]])
def test_a_verdict_needs_a_check_and_all_of_them(checks: list[Check]) -> None:
    problems = [BAD.sentence] * checks.count(BAD)
    found = verdict(checks)
    assert (found["passed"], found["problems"]) == (bool(checks) and not problems, problems)
    assert [row["passed"] for row in found["checks"]] == [check.passed for check in checks]
    parity = Parity({"b": 1.0}, tuple(checks))
    assert parity.problems == problems
    more = parity.extended({"c": 2}, BAD)
    assert more.figures == {"b": 1.0, "c": 2}
    assert more.problems == [*problems, BAD.sentence]
    figures = {"a": NAN, "of": {"b": -INF, "c": 0.0}, "n": 3, "s": "x", "yes": True, "t": None}
    assert only_finite(figures) == {"of": {"c": 0.0}, "n": 3, "s": "x", "yes": True, "t": None}


LOGITS = {
    "max_log_prob_difference": 0.5,
    "rms_log_prob_difference": 0.25,
    "top1_agreement": 0.75,
    "perplexity": 10.0,
    "reference_perplexity": 8.0,  # they differ by 0.25
    "floor_top1_agreement": 0.75,
    "floor_perplexity_difference": 0.0,
    "largest_allowed": 0.5,
}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"perplexity": 10.01}, False),
        ({"perplexity": 5.9}, False),
        ({"perplexity": 6.0}, True),
        ({"perplexity": 12.0, "floor_perplexity_difference": 0.25}, True),
        ({"perplexity": 12.1, "floor_perplexity_difference": 0.25}, False),
        ({"reference_perplexity": INF}, False),
        ({"reference_perplexity": INF, "perplexity": INF}, False),
        ({"floor_perplexity_difference": INF}, False),
        ({"top1_agreement": 0.74}, False),
        ({"max_log_prob_difference": 0.51}, False),
        ({"noise_allowed": 0.25, "max_log_prob_difference": 9.0}, True),
        ({"noise_allowed": 0.24}, False),
        ({"noise_allowed": 0.25, "max_log_prob_difference": INF}, False),
    ],
)
def test_logits_are_within_each_limit(changes: dict[str, Any], passes: bool) -> None:
    found = verdict(logits_checks({**LOGITS, **changes}, LIMITS))
    assert found["passed"] == passes, found
    strict_json.dumps(found)


@pytest.mark.parametrize(
    ("steps", "mean", "passes"),
    [
        (2.0, 0.49, True),
        (2.01, 0.49, False),
        (2.0, 0.51, False),
        (NAN, 0.49, False),
        (2.0, NAN, False),
    ],
)
def test_layers_are_within_each_limit(steps: float, mean: float, passes: bool) -> None:
    up = torch.full((2000,), 4.0 + 0.5 * mean)
    up[0] = 4.0 + 0.5 * steps
    assert (not layers(up=up).problems) == passes


@pytest.mark.parametrize(
    ("noise", "floor_noise", "passes"),
    [
        (0.0, 0.0, True),
        (9e-7, 0.0, True),  # more than 60 dB
        (1.1e-6, 0.0, False),
        (3.9e-4, 1e-4, True),  # the floor is 40 dB, and 34 are enough
        (4.1e-4, 1e-4, False),
        (0.0315, 10.0, True),  # 15 dB is the least
        (0.0317, 10.0, False),
        (NAN, 1e-4, False),
    ],
)
def test_outputs_as_near_as_two_simulations(noise: float, floor_noise: float, passes: bool) -> None:
    sqnr, floor = sqnr_db(1.0, noise), sqnr_db(1.0, floor_noise)
    assert output_check("logits", sqnr, floor, LIMITS).passed == passes


def test_differences_of_outputs_add_up() -> None:
    one = torch.tensor([1.0, 2.0])
    interface = SimpleNamespace(inputs=("x",), primary="y")
    graph = SimpleNamespace(interface=interface, marks=(), encodings={})
    simulation: Any = SimpleNamespace(
        graph=lambda: graph,
        values=lambda batch: {},
        bind=lambda batch: batch,
        outputs=lambda batch: {"y": one},
        perturbed_outputs=lambda batch: {"y": one + 0.25 * batch["x"]},
    )
    runtime: Any = SimpleNamespace(
        has_layers=False,
        parity=lambda *arguments: None,
        run=lambda batch: {"y": one + 0.25 + 0.25 * batch["x"]},
    )
    batches = [{"x": torch.tensor(1.0)}, {"x": torch.tensor(0.0)}]
    figures = compare_outputs(simulation, batches, runtime, LIMITS).figures
    assert figures["max_abs_difference"] == {"y": 0.5}
    assert figures["sqnr"]["y"] == pytest.approx(10 * math.log10(10 / 0.625))
    assert figures["floor_sqnr"]["y"] == pytest.approx(10 * math.log10(10 / 0.125))


def test_the_interval_of_an_agreement() -> None:
    z = 1.96
    for right in (100, 60, 0):
        share, n = right / 100, 50
        root = math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        expected = (share + z * z / (2 * n) - z * root) / (1 + z * z / n)
        same = torch.arange(100) < right
        assert lowest_agreement(same) == pytest.approx(expected, abs=1e-12)
    assert lowest_agreement(torch.ones(100)) == pytest.approx(0.92865, abs=1e-5)


def test_perplexities_and_what_rounding_explains() -> None:
    assert perplexity(30.0, 10) == pytest.approx(math.e**3)
    assert perplexity(1e6, 10) == INF
    assert math.isnan(perplexity(NAN, 10))
    assert math.isnan(perplexity(0.0, 0))
    assert perplexity_floor(0.0, 10) == 0
    assert perplexity_floor(4.0, 10) == pytest.approx(math.exp(0.392) - 1)
    assert perplexity_floor(1e12, 10) == INF


def test_the_largest_of_differences_and_bits_as_they_are() -> None:
    assert largest(torch.tensor([1.0, 3.0, 2.0])) == 3.0
    assert largest(torch.tensor([1.0, NAN])) == INF
    assert largest(torch.tensor([])) == 0.0
    one = torch.tensor([1.0, NAN])
    assert is_same(one, one.clone())
    assert not is_same(one, torch.tensor([1.0, 1.0]))
    assert not is_same(torch.ones(2), torch.tensor([1.0, 1.0 + 2e-7]))


WORDS = 12
GENERATOR = torch.Generator().manual_seed(5)
TABLE, OTHER = (2 * torch.randn(WORDS, WORDS, generator=GENERATOR) for _ in range(2))
IDS = torch.randint(0, WORDS, (2, 10), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[:, :4] = IGNORED


def says(table: Tensor) -> Any:
    return lambda ids: table[ids]


def compared(table: Tensor, labels: Tensor = LABELS, **options: Any) -> SimpleNamespace:
    reference = make_reference({"adapter": says(TABLE)}, Sequences(IDS, labels), **options)
    return SimpleNamespace(**compare_logits(says(table), reference, LIMITS).figures)


SHORTER = LABELS.clone()
SHORTER[1, 7:] = IGNORED


@pytest.mark.parametrize(
    ("labels", "places"),
    [
        (LABELS, [range(3, 10)] * 2),  # the fourth token's logits predict the fifth
        (SHORTER, [range(3, 10), range(3, 6)]),
        (IDS, [range(10)] * 2),
    ],
    ids=["in the loss", "conversations that end at different tokens", "all"],
)
def test_logits_that_predict_a_loss_token_are_compared(labels: Tensor, places: Any) -> None:
    figures = compared(OTHER, labels)
    rows = torch.cat([ids[[*place]] for ids, place in zip(IDS, places, strict=True)])
    ours, theirs = (table[rows].double().log_softmax(-1) for table in (OTHER, TABLE))
    assert (figures.tokens, figures.sequences) == (len(rows), 2)
    assert figures.max_log_prob_difference == pytest.approx(float((ours - theirs).abs().max()))
    rms = float((ours - theirs).square().mean().sqrt())
    assert figures.rms_log_prob_difference == pytest.approx(rms, rel=1e-5)
    same = float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    assert figures.top1_agreement == pytest.approx(same)
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert figures.kl_divergence == pytest.approx(kl, rel=1e-4)
    losses: dict[str, list[float]] = {"perplexity": [], "reference_perplexity": []}
    for (key, found), table in zip(losses.items(), (OTHER, TABLE), strict=True):
        for ids, counted in zip(IDS, labels, strict=True):
            log_probs = table[ids[:-1]].double().log_softmax(-1)
            pairs = zip(log_probs, counted[1:].tolist(), strict=True)
            found.extend(-float(row[label]) for row, label in pairs if label != IGNORED)
        expected = math.exp(sum(found) / len(found))
        assert getattr(figures, key) == pytest.approx(expected)


def test_a_reference_counts_tokens_that_follow_one() -> None:
    text = Sequences(IDS, IDS.clone())
    reference = make_reference({"adapter": says(TABLE)}, text)
    labels = torch.full_like(IDS, IGNORED)
    labels[:, 0] = IDS[:, 0]  # no token is before the first
    assert compare_logits(says(TABLE), {**reference, "labels": labels}).problems


def test_how_far_a_runtime_rounds_is_the_largest_difference_of_a_logit() -> None:
    other = TABLE.clone()
    other[int(IDS[0, 3]), 5] += 0.25
    text = Sequences(IDS[:1], IDS[:1].clone())
    reference = make_reference({"adapter": says(TABLE)}, text, rounded={"adapter": says(other)})
    assert float(reference["adapter.rounding"]) == pytest.approx(0.25)
    assert "adapter.noise" not in reference


def test_tokens_beyond_the_likeliest_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlora.targets.proof.reference.TOP", 3)
    figures = compared(OTHER, IDS)
    expected = []
    for ids in IDS:
        p, q = (table[ids].double().log_softmax(-1) for table in (TABLE, OTHER))
        top = p.topk(3).indices
        p, q = p.gather(-1, top).exp(), q.gather(-1, top).exp()
        r, s = 1 - p.sum(-1), 1 - q.sum(-1)
        expected.append((p * (p / q).log()).sum(-1) + r * (r / s).log())
    assert figures.kl_divergence == pytest.approx(float(torch.cat(expected).mean()), rel=1e-5)


def test_what_rounding_alone_explains_of_exact_computations() -> None:
    figures = compared(TABLE)
    top = max(float(TABLE[ids].abs().max()) for ids in IDS)
    assert figures.largest_allowed == pytest.approx(2 * LOGIT_DIFFERENCE * top)
    assert not hasattr(figures, "noise_allowed")
    assert figures.floor_top1_agreement == AGREEMENT == 0.999
    assert figures.floor_perplexity_difference == 0.0
    assert (LOGIT_DIFFERENCE, NOISE) == (1e-4, 4.0)


class Layers:
    """A simulation of two layers with grids of steps 0.5 and 0.25."""

    def __init__(self, *marks: GraphValue):
        self.marks = marks or tuple(GraphValue(n, n, Kind.ACTIVATION) for n in ("up", "down"))

    def graph(self) -> Any:
        grids = {"up": 0.5, "down": 0.25}
        encodings = {n: SimpleNamespace(scale=torch.tensor(s)) for n, s in grids.items()}
        return SimpleNamespace(marks=self.marks, encodings=encodings)

    def values(self, batch: Any) -> dict[str, Tensor]:
        return {"up": torch.full((2000,), 4.0), "down": torch.full((100,), 4.0)}

    def bind(self, batch: Any) -> Any:
        return batch


def layers(**computed: Tensor) -> Parity:
    values = {**Layers().values({}), **computed}
    runtime: Any = SimpleNamespace(run_layers=lambda values_, tensors: values)
    simulation: Any = Layers()
    return compare_layers(runtime, simulation, {}, LIMITS)


def test_differences_of_layers_are_in_their_own_steps() -> None:
    up, down = torch.full((2000,), 4.0), torch.full((100,), 4.0)
    up[0], down[3] = 4.75, 3.5  # 1.5 and 2 steps
    mean = "worst_layer_mean_steps"
    assert layers(up=up, down=down).figures == {
        "worst_layer": "down",
        "worst_layer_steps": 2.0,
        mean: pytest.approx(2 / 1000),  # as if of 1,000 values
        "layers": 2,
    }
    assert layers(up=torch.full((2000,), 4.5)).figures[mean] == 1.0
    broken = layers(down=torch.full((100,), NAN))
    assert math.isnan(broken.figures[mean])
    assert "layer down, the worst of 2: not finite" in broken.problems[0]
    simulation: Any = Layers(GraphValue("w", "w", Kind.BASE))
    runtime: Any = SimpleNamespace()
    assert compare_layers(runtime, simulation, {}).checks == ()  # only weights


class Session(TableRuntime):
    """Its adapters leak into each other where `leaks` says: "state": what was active before changes
    the logits; "cache": other adapters' steps change the cache."""

    has_cache = True

    def __init__(self, leaks: str = ""):
        super().__init__({"": TABLE, "first": OTHER, "second": TABLE.flip(0)})
        self.leaks, self.uses = leaks, 0
        self.ran: list[tuple[str, int]] = []  # state and tokens of each call of `extend`

    def switch_to(self, adapter: Path | None) -> None:
        super().switch_to(adapter)
        self.uses += 1

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return super().logits(ids) + (self.uses if self.leaks == "state" else 0)

    def extend(self, ids: Tensor, past: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.ran.append((self.state, ids.shape[1]))
        shift = past.get("shift", torch.zeros(1))
        if self.leaks == "cache":
            shift = shift + len({state for state, _ in self.ran} - {self.state})
        return self.tables[self.state][ids] + shift, {"shift": shift}


@pytest.mark.parametrize("adapter", [None, Path("first")])
@pytest.mark.parametrize("leaks", ["", "state"])
def test_a_state_gives_the_same_bits_after_others(adapter: Path | None, leaks: str) -> None:
    session: Any = Session(leaks)
    bits = list(switching(session, adapter, [Path("second")], IDS[:1]))
    assert bits
    assert all(bit.passed == (not leaks) for bit in bits)
    names = " ".join(bit.what for bit in bits)
    assert "without an adapter" in names
    assert ("first" in names) == (adapter is not None)
    assert session.state == ""


@pytest.mark.parametrize("adapter", [None, Path("first")])
@pytest.mark.parametrize("leaks", ["", "cache"])
@pytest.mark.parametrize("count", [4, 16])
def test_a_cache_is_compared_token_by_token(
    adapter: Path | None, leaks: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwlora.targets.proof.compare.DECODED", count)
    count = min(count, IDS.shape[1] - 1)
    table = TABLE if adapter is None else OTHER
    labels = IDS.clone()
    labels[:, 4:7] = IGNORED  # of these, too, the cache is compared
    reference = make_reference({"adapter": says(table)}, Sequences(IDS, labels))
    session: Any = Session(leaks)
    cache = compare_cache(session, reference, adapter, [Path("second")], LIMITS)
    assert cache.checks[-1].passed == (not leaks)
    assert cache.figures["tokens"] == count
    assert session.state == ""
    name = adapter.name if adapter else ""
    steps = [IDS.shape[1] - count] + [1] * count
    assert [tokens for state, tokens in session.ran if state == name] == 2 * steps
    assert {state for state, _ in session.ran} == {"", "second", name}
    if not leaks:
        assert cache.figures["max_log_prob_difference"] < 1e-5
        assert not cache.problems
    assert compare_cache(session, reference, Path("second"), [], LIMITS).problems


TOKENS = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(5))
NEXT = 3 * torch.randn(90, 90, generator=torch.Generator().manual_seed(6))


def right(ids: Tensor) -> Tensor:
    """Logits of a model that knows the last token only."""
    return NEXT[ids]


def noisy(size: float) -> Callable[[Tensor], Tensor]:
    """The same with noise of `size`."""
    noise = torch.randn(12, 90, generator=torch.Generator().manual_seed(7))
    return lambda ids: right(ids) + size * noise


def broken(logits: Callable[[Tensor], Tensor], reference: dict[str, Tensor]) -> list[str]:
    return measure_logits(logits, reference).problems


def simulated_reference(noise: float, bitwidth: int = 16) -> dict[str, Tensor]:
    text, states = Sequences(TOKENS, TOKENS), {"adapter": right}
    return make_reference(states, text, {"adapter": noisy(noise)}, least_noise=2.0**-bitwidth)


@pytest.mark.parametrize(
    ("noise", "bitwidth", "found", "is_right"),
    [
        (1e-3, 16, 1e-3, True),
        (1e-3, 16, 3e-3, True),
        (1e-3, 16, 2e-2, False),
        (0.0, 16, 2e-2, False),  # no value fell on another step
        (0.0, 8, 2e-2, True),  # a step of 8 bits is as large
    ],
)
def test_log_probabilities_on_grids_may_differ_as_rounding_makes_them(
    noise: float, bitwidth: int, found: float, is_right: bool
) -> None:
    problems = broken(noisy(found), simulated_reference(noise, bitwidth))
    assert any("root mean square" in problem for problem in problems) != is_right


@pytest.mark.parametrize(
    ("schemes", "cached_graphs", "share"),
    [
        (Schemes(), False, 2.0**-16),
        (Schemes(adapter_activation_bitwidth=8), False, 2.0**-8),
        (Schemes(), True, GRAPHS_NOISE),
        (Schemes(Scheme(8)), True, 2.0**-8),
    ],
)
def test_noise_is_at_least_what_files_round(schemes: Any, cached_graphs: Any, share: Any) -> None:
    assert least_noise(schemes, cached_graphs) == share


def changed_by(name: str, by: Callable[[Tensor], Tensor], reference: dict[str, Tensor]) -> None:
    reference[name] = by(reference[name])


NEVER = torch.tensor(-math.inf)
CHANGED: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "adapter.largest": [lambda t: t * math.nan, lambda t: -t],
    "adapter.log_probs": [
        lambda t: t + math.log(1.5),
        lambda t: t.where(t < -3, NEVER),
        lambda t: t[:, :-1],
    ],
    "adapter.losses": [lambda t: t - 20, lambda t: t[:1]],
    "adapter.top": [
        *(lambda t: t[..., :0], lambda t: t - 50, lambda t: t.float(), lambda t: t[0, 0, 0])
    ],
    "adapter.other_same": [lambda t: t[:1], lambda t: t.int()],
    "adapter.other_losses": [lambda t: t.float()],
    "adapter.noise": [lambda t: -t - 1, lambda t: t[None]],
    "ids": [lambda t: t[0], lambda t: t - 1, lambda t: t.int()],
    "labels": [
        lambda t: t[:, :5],
        lambda t: t + 1,
        lambda t: torch.cat([t[:, :1], torch.full_like(t[:, 1:], IGNORED)], 1),
    ],
}
ABSENT = [("labels",), ("adapter.noise",), ("adapter.other_same",)]
ABSENT.append(("adapter.top", "adapter.log_probs"))  # only losses
DAMAGE: list[Callable[[dict[str, Tensor]], Any]] = [
    *(partial(changed_by, name, by) for name, changes in CHANGED.items() for by in changes),
    *(lambda r, names=names: [r.pop(name) for name in names] for names in ABSENT),
    lambda r: r.update({name: r[name] - 90 for name in ("ids", "labels")}),
    lambda r: r.update({"other": torch.ones(1)}),
    lambda r: r.update({"base.top": r["adapter.top"]}),
    lambda r: r.clear(),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_reference_that_proves_nothing(damage: Callable[[dict[str, Tensor]], Any]) -> None:
    reference = simulated_reference(1e-3)
    assert not broken(right, reference)
    damage(reference)
    with pytest.raises(SourceError, match="proves nothing"):
        broken(right, reference)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["noise", "other_losses"])
def test_a_floor_that_is_not_finite_limits_nothing(name: str, value: float) -> None:
    reference = simulated_reference(1e-3)
    reference[f"adapter.{name}"] = torch.full_like(reference[f"adapter.{name}"], value)
    assert broken(right, reference)


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    reference = simulated_reference(1e-3)
    with pytest.raises(SourceError, match="a vocabulary of 80 tokens"):
        broken(lambda ids: right(ids)[..., :80], reference)


@pytest.mark.parametrize(("effect", "told_apart"), [(1.0, True), (1e-5, False)])
def test_an_adapter_that_changes_too_little_is_named(effect: float, told_apart: bool) -> None:
    states = {"base": noisy(effect), "adapter": right}
    reference = make_reference(states, Sequences(TOKENS, TOKENS))
    assert is_told_apart(reference, Limits()) == told_apart


@pytest.mark.parametrize("floor", [0.999, 0.97, 0.9, 0.6])
def test_tokens_decoded_one_by_one_may_differ_as_chance_has_it(floor: float) -> None:
    chances = Binomial(DECODED, torch.tensor(floor)).log_prob(torch.arange(DECODED + 1.0)).exp()
    for right in range(DECODED + 1):
        is_chance = chances[: right + 1].sum() > 0.025
        passes = right >= 0.9 * DECODED or bool(is_chance)
        assert decoded(right / DECODED, floor).passed == passes
    assert not decoded(math.nan, floor).passed
