"""Every limit of a proof, on both sides: what passes, what does not, and what is no number."""

import itertools
import json
import math
from collections.abc import Callable, Mapping
from contextlib import contextmanager
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
from qwlora.targets.proof import checks, reference
from qwlora.targets.proof.checks import Check, Limits, Parity, at_least, at_most, is_so, verdict
from qwlora.targets.proof.compare import (
    DECODED,
    compare_cache,
    compare_layers,
    compare_outputs,
    output_check,
    switching,
)
from qwlora.targets.proof.prove import decoded, fitting, proven, results_of
from qwlora.targets.proof.readme import proof_table
from qwlora.targets.proof.reference import GRAPHS_NOISE, compare_logits, logits_of, make_reference
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import Rounding
from targets.proof.toy_runtime import TableRuntime, Trained
from targets.proofs import measure_logits, verify_weights

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
    both = at_most("it", value, limit), at_least("it", value, limit)
    assert [check.passed for check in both] == [is_at_most, is_at_least]
    for check, side in zip(both, ("at most", "at least"), strict=True):
        assert check.value == (value if math.isfinite(value) else None)
        assert check.limit == (limit if math.isfinite(limit) else None)
        assert ("not finite" in check.sentence) == (None in (check.value, check.limit))
        assert side in check.sentence
        strict_json.dumps(asdict(check))


def test_a_check_is_read_as_it_was_written_and_nothing_else_is_a_number_or_passes() -> None:
    so, not_so = is_so("it is", True), is_so("it is", False)
    number = at_most("it", 1.0, 2.0, "nats")
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
    constants = reference.LOGIT_DIFFERENCE, reference.NOISE, reference.AGREEMENT
    assert constants == (1e-4, 4.0, 0.999)


GOOD, BAD = at_most("good", 1.0, 2.0), at_most("bad", 3.0, 2.0)


@pytest.mark.parametrize("rows", [[], [GOOD], [GOOD, GOOD], [GOOD, BAD, GOOD], [BAD, BAD]])
def test_a_verdict_needs_a_check_and_all_of_them(rows: list[Check]) -> None:
    problems = [BAD.sentence] * rows.count(BAD)
    found = verdict(rows)
    assert (found["passed"], found["problems"]) == (bool(rows) and not problems, problems)
    assert [row["passed"] for row in found["checks"]] == [check.passed for check in rows]
    parity = Parity({"b": 1.0}, tuple(rows))
    assert parity.problems == problems
    more = parity.extended({"c": 2}, BAD)
    assert more.figures == {"b": 1.0, "c": 2}
    assert more.problems == [*problems, BAD.sentence]


def test_figures_in_json_are_finite() -> None:
    figures = {"a": NAN, "of": {"b": -INF, "c": 0.0}, "n": 3, "s": "x", "yes": True, "t": None}
    kept = {"of": {"c": 0.0}, "n": 3, "s": "x", "yes": True, "t": None}
    assert checks.only_finite(figures) == kept


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
WITHIN: list[dict[str, float]] = [
    {},
    {"perplexity": 6.0},
    {"perplexity": 12.0, "floor_perplexity_difference": 0.25},
    {"noise_allowed": 0.25, "max_log_prob_difference": 9.0},
]
BEYOND: list[dict[str, float]] = [
    *({"perplexity": value} for value in (10.01, 5.9)),
    {"perplexity": 12.1, "floor_perplexity_difference": 0.25},
    {"reference_perplexity": INF, "perplexity": INF},
    {"floor_perplexity_difference": INF},
    {"top1_agreement": 0.74},
    {"max_log_prob_difference": 0.51},
    {"noise_allowed": 0.24},
    {"noise_allowed": 0.25, "max_log_prob_difference": INF},
]


@pytest.mark.parametrize("changes", WITHIN + BEYOND)
def test_logits_are_within_each_limit(changes: dict[str, float]) -> None:
    found = verdict(reference.logits_checks({**LOGITS, **changes}, LIMITS))
    assert found["passed"] == (changes in WITHIN), found
    strict_json.dumps(found)


@pytest.mark.parametrize(
    ("floor_noise", "near", "far"),
    [
        (0.0, 9e-7, 1.1e-6),  # 60 dB
        (1e-4, 3.9e-4, 4.1e-4),  # the floor is 40 dB, and 34 are enough
        (10.0, 0.0315, 0.0317),  # 15 dB is the least
    ],
)
def test_outputs_as_near_as_two_simulations(floor_noise: float, near: float, far: float) -> None:
    noises = (0.0, near, far, NAN)
    sqnrs, floor = [sqnr_db(1.0, noise) for noise in noises], sqnr_db(1.0, floor_noise)
    passed = [output_check("logits", sqnr, floor, LIMITS).passed for sqnr in sqnrs]
    assert passed == [True, True, False, False]
    assert math.isnan(sqnr_db(1.0, INF))
    assert math.isnan(sqnr_db(NAN, 1.0))
    assert sqnr_db(1e-300, 1e300) == -INF


def simulation_of(outputs: Any, perturbed: Any = None, values: Any = None, **graph: Any) -> Any:
    """A simulation whose outputs are a function of the batch, and whose layers have these values."""
    interface = SimpleNamespace(primary="logits")
    return SimpleNamespace(
        graph=lambda: SimpleNamespace(interface=interface, **graph),
        values=lambda batch: values,
        bind=lambda batch: batch,
        outputs=outputs,
        perturbed_outputs=perturbed or outputs,
    )


def test_differences_of_outputs_add_up() -> None:
    one = torch.tensor([1.0, 2.0])
    perturbed = lambda batch: {"y": one + 0.25 * batch["x"]}  # noqa: E731
    simulation = simulation_of(lambda batch: {"y": one}, perturbed)
    runtime: Any = SimpleNamespace(run=lambda batch: {"y": one + 0.25 + 0.25 * batch["x"]})
    batches = [{"x": torch.tensor(1.0)}, {"x": torch.tensor(0.0)}]
    figures = compare_outputs(simulation, batches, runtime, LIMITS).figures
    assert figures["max_abs_difference"] == {"y": 0.5}
    assert figures["sqnr"]["y"] == pytest.approx(10 * math.log10(10 / 0.625))
    assert figures["floor_sqnr"]["y"] == pytest.approx(10 * math.log10(10 / 0.125))


def test_statistics_of_differences() -> None:
    perplexity, floor = reference.perplexity, reference.perplexity_floor
    assert perplexity(30.0, 10) == pytest.approx(math.e**3)
    assert perplexity(1e6, 10) == INF
    assert math.isnan(perplexity(NAN, 10))
    assert math.isnan(perplexity(0.0, 0))
    assert floor(4.0, 10) == pytest.approx(math.exp(0.392) - 1)
    assert (floor(0.0, 10), floor(1e12, 10)) == (0, INF)
    # Wilson's interval, of half as many tokens
    found = [reference.lowest_agreement(torch.arange(100) < right) for right in (100, 60, 0)]
    assert found == pytest.approx([0.92865, 0.46181, 0.0], abs=1e-5)
    assert reference.largest(torch.tensor([1.0, 3.0, 2.0])) == 3.0
    assert reference.largest(torch.tensor([1.0, NAN])) == INF
    assert reference.largest(torch.tensor([])) == 0.0
    one = torch.tensor([1.0, NAN])
    assert reference.is_same(one, one.clone())
    assert not reference.is_same(one, torch.tensor([1.0, 1.0]))
    assert not reference.is_same(torch.ones(2), torch.tensor([1.0, 1.0 + 2e-7]))


WORDS = 12
GENERATOR = torch.Generator().manual_seed(5)
TABLE, OTHER = (2 * torch.randn(WORDS, WORDS, generator=GENERATOR) for _ in range(2))
IDS = torch.randint(0, WORDS, (2, 10), generator=GENERATOR)
LABELS = IDS.clone()
LABELS[:, :4] = IGNORED
SHORTER = LABELS.clone()
SHORTER[1, 7:] = IGNORED


def says(table: Tensor) -> Any:
    return lambda ids: table[ids]


def compared(table: Tensor, labels: Tensor = LABELS) -> SimpleNamespace:
    expected = make_reference({"adapter": says(TABLE)}, Sequences(IDS, labels))
    return SimpleNamespace(**compare_logits(says(table), expected, LIMITS).figures)


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
    for key, table in (("perplexity", OTHER), ("reference_perplexity", TABLE)):
        log_probs = table[IDS[:, :-1]].double().log_softmax(-1).flatten(0, 1)
        pairs = zip(log_probs, labels[:, 1:].flatten().tolist(), strict=True)
        losses = [-float(row[label]) for row, label in pairs if label != IGNORED]
        assert getattr(figures, key) == pytest.approx(math.exp(sum(losses) / len(losses)))


def test_a_reference_counts_tokens_that_follow_one() -> None:
    expected = make_reference({"adapter": says(TABLE)}, Sequences(IDS, IDS.clone()))
    labels = torch.full_like(IDS, IGNORED)
    labels[:, 0] = IDS[:, 0]  # no token is before the first
    assert compare_logits(says(TABLE), {**expected, "labels": labels}).problems


def test_how_far_a_runtime_rounds_is_the_largest_difference_of_a_logit() -> None:
    exact, top = compared(TABLE), float(TABLE[IDS].abs().max())
    assert exact.largest_allowed == pytest.approx(2 * reference.LOGIT_DIFFERENCE * top)
    assert not hasattr(exact, "noise_allowed")
    assert exact.floor_top1_agreement == reference.AGREEMENT
    assert exact.floor_perplexity_difference == 0.0
    other = TABLE.clone()
    other[int(IDS[0, 3]), 5] += 0.25
    text = Sequences(IDS[:1], IDS[:1].clone())
    found = make_reference({"adapter": says(TABLE)}, text, rounded={"adapter": says(other)})
    assert float(found["adapter.rounding"]) == pytest.approx(0.25)
    allowed = compare_logits(says(TABLE), found).figures["largest_allowed"]
    top = float(TABLE[IDS[:1]].abs().max())
    assert allowed == pytest.approx(2 * 0.25 + 2 * reference.LOGIT_DIFFERENCE * top)
    assert "adapter.noise" not in found


def test_tokens_beyond_the_likeliest_count_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "TOP", 3)
    p, q = (table[IDS].double().log_softmax(-1) for table in (TABLE, OTHER))
    top = p.topk(3).indices
    p, q = p.gather(-1, top).exp(), q.gather(-1, top).exp()
    r, s = 1 - p.sum(-1), 1 - q.sum(-1)
    expected = (p * (p / q).log()).sum(-1) + r * (r / s).log()
    assert compared(OTHER, IDS).kl_divergence == pytest.approx(float(expected.mean()), rel=1e-5)


def layers(kind: Kind = Kind.ACTIVATION, **computed: Tensor) -> Parity:
    """The comparison of two layers, with grids of steps 0.5 and 0.25, whose values are all 4."""
    grids = {"up": 0.5, "down": 0.25}
    marks = tuple(GraphValue(name, name, kind) for name in grids)
    encodings = {n: SimpleNamespace(scale=torch.tensor(step)) for n, step in grids.items()}
    values = {"up": torch.full((2000,), 4.0), "down": torch.full((100,), 4.0)}
    simulation: Any = simulation_of(None, marks=marks, encodings=encodings, values=values)
    runtime: Any = SimpleNamespace(run_layers=lambda *_: {**values, **computed})
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
    assert not layers(up=up, down=down).problems  # at the limit
    down[3] = 3.49
    assert [problem[:26] for problem in layers(down=down).problems] == [
        "difference of layer down, "
    ]
    half = layers(up=torch.full((2000,), 4.5))
    assert half.figures[mean] == 1.0
    assert [problem[:23] for problem in half.problems] == ["largest mean difference"]
    broken = layers(down=torch.full((100,), NAN))
    assert math.isnan(broken.figures[mean])
    assert len(broken.problems) == 2
    assert "layer down, the worst of 2: not finite" in broken.problems[0]
    assert layers(Kind.BASE).checks == ()  # only weights


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
    labels = IDS.clone()
    labels[:, 4:7] = IGNORED  # of these, too, the cache is compared
    states = {"adapter": says(TABLE if adapter is None else OTHER)}
    expected, session = make_reference(states, Sequences(IDS, labels)), Session(leaks)
    cache = compare_cache(session, expected, adapter, [Path("second")], LIMITS)
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
    assert compare_cache(session, expected, Path("second"), [], LIMITS).problems


TOKENS = torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(5))
NEXT = 3 * torch.randn(90, 90, generator=torch.Generator().manual_seed(6))
right = says(NEXT)


def noisy(size: float) -> Callable[[Tensor], Tensor]:
    """The right logits with noise of `size`."""
    noise = torch.randn(12, 90, generator=torch.Generator().manual_seed(7))
    return lambda ids: right(ids) + size * noise


def broken(logits: Callable[[Tensor], Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    return measure_logits(logits, expected).problems


def simulated_reference(
    noise: float = 1e-3, bitwidth: int = 16, kind: str = "perturbed"
) -> dict[str, Tensor]:
    others: Any = {kind: {"adapter": noisy(noise)}}
    text = Sequences(TOKENS, TOKENS)
    return make_reference({"adapter": right}, text, **others, least_noise=2.0**-bitwidth)


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
    assert reference.least_noise(schemes, cached_graphs) == share


def changed_by(name: str, by: Callable[[Tensor], Tensor], tensors: dict[str, Tensor]) -> None:
    tensors[name] = by(tensors[name])


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
    tensors = simulated_reference()
    assert not broken(right, tensors)
    damage(tensors)
    with pytest.raises(SourceError, match="proves nothing"):
        broken(right, tensors)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", ["noise", "rounding", "other_losses"])
def test_a_floor_that_is_not_finite_limits_nothing(name: str, value: float) -> None:
    tensors = simulated_reference(kind="rounded" if name == "rounding" else "perturbed")
    tensors[f"adapter.{name}"].fill_(value)
    assert broken(right, tensors)


def test_a_reference_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(SourceError, match="a vocabulary of 80 tokens"):
        broken(lambda ids: right(ids)[..., :80], simulated_reference())


@pytest.mark.parametrize(("effect", "told_apart"), [(1.0, True), (1e-5, False)])
def test_an_adapter_that_changes_too_little_is_named(effect: float, told_apart: bool) -> None:
    states = {"base": noisy(effect), "adapter": right}
    expected = make_reference(states, Sequences(TOKENS, TOKENS))
    assert reference.is_told_apart(expected, Limits()) == told_apart


@pytest.mark.parametrize("floor", [0.999, 0.97, 0.9, 0.6])
def test_tokens_decoded_one_by_one_may_differ_as_chance_has_it(floor: float) -> None:
    chances = Binomial(DECODED, torch.tensor(floor)).log_prob(torch.arange(DECODED + 1.0)).exp()
    for same in range(DECODED + 1):
        is_chance = chances[: same + 1].sum() > 0.025
        passes = same >= 0.9 * DECODED or bool(is_chance)
        assert decoded(same / DECODED, floor).passed == passes
    assert not decoded(math.nan, floor).passed


SIZE = 24
EACH = torch.arange(SIZE)[None]  # each token once, so that a row of the table is of one place
ROWS = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(8))
TEXT = Sequences(EACH, EACH.clone().where(EACH >= 8, IGNORED))
EXACT = {"adapter": says(ROWS)}
REFERENCE = make_reference(EXACT, TEXT, EXACT)
OUT_OF_LOSS, IN_LOSS = 2, 12
LARGE = "a wrong scale"


def damaged(value: float, token: int, entry: int = 0) -> Tensor:
    """The right logits, with one value at one token; tokens 0 to 6 predict no loss token."""
    rows = ROWS.clone()
    rows[token, entry] = value
    return rows


BROKEN = {
    "NaN": damaged(NAN, IN_LOSS),
    "NaN at a token that is not in the loss": damaged(NAN, OUT_OF_LOSS),
    "infinity": damaged(INF, IN_LOSS),
    "minus infinity, unlikely": damaged(-INF, OUT_OF_LOSS, int(ROWS[OUT_OF_LOSS].argmin())),
    LARGE: 1e5 * ROWS.flip(0),
}


def outputs_parity(rows: Tensor) -> Parity:
    simulation = simulation_of(lambda batch: {"logits": ROWS[batch["input_ids"]]})
    return compare_outputs(simulation, [{"input_ids": EACH}], TableRuntime({"": rows}))


def graphs_parity(rows: Tensor) -> Parity:
    return measure_logits(says(rows), REFERENCE)


@pytest.mark.parametrize("compare", [outputs_parity, graphs_parity])
@pytest.mark.parametrize("name", BROKEN)
def test_logits_that_are_not_finite_fail_every_proof(compare: Any, name: str) -> None:
    parity = compare(BROKEN[name])
    if name == LARGE and compare is not outputs_parity:
        assert any("perplexity" in p and ": not finite" in p for p in parity.problems)
    assert any("not finite" in problem for problem in parity.problems) or name == LARGE
    assert parity.problems
    strict_json.dumps(checks.only_finite(parity.figures) | verdict(parity.checks))
    assert not compare(ROWS).problems


def test_a_model_that_the_rounding_breaks_limits_nothing() -> None:
    model = Trained(ROWS, ROWS)

    @contextmanager
    def overflow() -> Any:
        model.table = BROKEN["NaN"]
        yield
        model.table = ROWS

    runtime, rounding = TableRuntime({"": ROWS}), Rounding([overflow])
    problems = verify_weights(runtime, model, Path(), TEXT, rounding).problems
    assert any("limit: at most not finite" in problem for problem in problems)


def record_of(rows: Tensor, shipped: Tensor | None = None) -> tuple[dict[str, Any], str]:
    """The record of a proof, and its table in a README."""
    runtime, model = TableRuntime({"": rows}), Trained(ROWS, ROWS)
    runtime.shipped = None if shipped is None else TableRuntime({"": shipped})
    parity = verify_weights(runtime, model, Path(), TEXT)
    expected = make_reference(logits_of(model), TEXT)  # type: ignore[arg-type]
    record = proven(TARGETS["hf"], parity, expected, Limits())
    strict_json.dumps(record)
    return record, "\n".join(proof_table({"first": record}))


@pytest.mark.parametrize("name", BROKEN)
def test_a_proof_shows_what_is_not_finite_and_checks_nothing_as_shipped(name: str) -> None:
    record, table = record_of(BROKEN[name])
    what = "perplexity" if name == LARGE else "largest logit"
    assert any(f"{what} with the adapter: not finite" in each for each in record["problems"])
    assert not any("switched off" in problem for problem in record["problems"])
    assert (", not finite |" if name == LARGE else "| not finite |") in table
    record, table = record_of(ROWS, BROKEN[name])
    assert record["passed"], record["problems"]
    assert "not finite" in table


def test_results_have_figures_as_shipped_next_to_exact_ones() -> None:
    record, _ = record_of(ROWS, 1.5 * ROWS)
    found = results_of(TARGETS["hf"], record, has_proof=True)
    own = record["figures"]["shipped"]["adapter"]
    for key in ("perplexity", "top1_agreement", "kl_divergence", "max_log_prob_difference"):
        assert found[f"shipped_{key}"] == own[key]
    assert found["shipped_kl_divergence"] > 100 * found["kl_divergence"]


@pytest.mark.parametrize(
    ("prompt", "rows", "counted"),
    [((4, 10), [0], 4), ((9, 10), [0, 1], 14)],
    ids=["one answer fits", "no answer fits"],
)
def test_masked_tokens_do_not_count_where_the_context_cuts_a_sequence(
    prompt: tuple[int, int], rows: list[int], counted: int, tmp_path: Path
) -> None:
    ids = torch.arange(24).view(2, 12)
    labels = ids.where(torch.arange(12) >= torch.tensor(prompt)[:, None], IGNORED)
    graphs = {"prompt": {"tokens": 4, "context": 6}, "token": {"tokens": 1, "context": 8}}
    (tmp_path / "graphs.json").write_text(json.dumps({"graphs": graphs}))
    whole = Sequences(ids, labels)
    text = fitting(whole, TARGETS["qairt"].parts(tmp_path, "first"))
    assert torch.equal(text.input_ids, ids[rows, :8])
    assert int((text.labels[:, 1:] != IGNORED).sum()) == counted
    assert fitting(whole, TARGETS["hf"].parts(tmp_path / "without", "first")) is whole
