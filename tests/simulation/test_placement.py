"""Placement: policies, rules in front of them, what they say about values, and masked scores.

No grid holds masked scores beside the rest, so they stay float from where they meet the mask to the
softmax, whatever lies between.
"""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qwlora import PlacementRule, Schemes, quantize_, simulate
from qwlora.errors import CalibrationError, GridError
from qwlora.graph.quantized_graph import Kind
from qwlora.graph.value_traits import Decision
from qwlora.simulation.placement import place
from qwlora.simulation.placement_rules import POLICIES, Policy, PolicyRule
from qwlora.simulation.simulation import Simulation
from simulation.captured import batch, simulation


@torch.library.custom_op("qwlora_test::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x * 2


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class OddNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True))


class EveryKind(nn.Module):
    """One value of every kind that rules tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = OddNorm(), nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.up(self.norm(x)).split(8, -1)
        _, variance = torch.var_mean(first, -1, keepdim=True)
        largest, _ = second.topk(8, -1)
        hidden = first.double().float() + largest * variance
        hidden = hidden + (ids > 3).float().unsqueeze(-1)
        turned = self.down(torch.ops.qwlora_test.twist(hidden))
        return turned + turned.relu(), first @ turned.transpose(-1, -2)


@pytest.fixture(scope="module")
def every_kind() -> ExportedProgram:
    example = (torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.long))
    return torch.export.export(EveryKind(), example)


MOVED = "data movement; the encoding of its input holds it"
OWNED = "inside OddNorm, which is one operation"
NPU = {
    "norm.pow": (Decision.FLOAT, OWNED),
    "norm.rsqrt": (Decision.FLOAT, OWNED),
    "norm.mul": (Decision.QUANTIZE, "output of OddNorm"),
    "up.linear": (Decision.QUANTIZE, "computes new values"),
    "output.split": (Decision.SHARE, MOVED),
    "output.topk": (Decision.SHARE, MOVED),
    "output.var_mean": (Decision.QUANTIZE, "computes new values"),
    "output.to": (Decision.FLOAT, "float64 is index arithmetic"),
    "output.add": (Decision.QUANTIZE, "computes new values"),
    "output.add_1": (Decision.FLOAT, "a residual addition"),
    "output.add_2": (Decision.FLOAT, "combined with a mask"),
    "output.unsqueeze": (Decision.FLOAT, "computed from integers only"),
    "output.twist": (Decision.QUANTIZE, "computes new values"),
    "output.matmul": (Decision.QUANTIZE, "computes new values"),
}


def decisions(program: ExportedProgram, **schemes: Any) -> dict[str, tuple[Decision, str]]:
    placement = place(program, Schemes(**schemes))
    return {p.name: (p.decision, p.reason) for p in placement.values}


def test_npu_decides_by_what_a_value_is(every_kind: ExportedProgram) -> None:
    found = decisions(every_kind)
    assert {name: found[name] for name in NPU} == NPU
    assert found["x"] == (Decision.QUANTIZE, "an input of the model")
    assert found["up.bias"] == (Decision.QUANTIZE, "a parameter that step 1 left float")
    found = decisions(every_kind, quantize_residual_adds=True)
    assert found["output.add_1"] == (Decision.QUANTIZE, "computes new values")


def test_matmul_inputs_and_weights_only(every_kind: ExportedProgram) -> None:
    found = decisions(every_kind, policy="matmul-inputs")
    quantized = {name for name, (decision, _) in found.items() if decision is Decision.QUANTIZE}
    # what the two linear layers read, and both factors of the product: the split one where it was made
    assert quantized == {"norm.mul", "output.twist", "up.linear", "down.linear"}
    assert not place(every_kind, Schemes(policy="weights-only")).marks
    made, weights = (simulation(Schemes(policy=p)) for p in ("matmul-inputs", "weights-only"))
    # a layer: two norms, q, k, v, softmax, the mixed values, the product of the MLP, and what
    # three lora_A give; the last norm
    assert len(made.quantizers) == 2 * 11 + 1
    assert {m.kind for m in made.marks} == {Kind.BASE, Kind.ADAPTER, Kind.ACTIVATION}
    assert {m.kind for m in weights.marks} == {Kind.BASE, Kind.ADAPTER}


def test_names_do_not_depend_on_what_is_decided(every_kind: ExportedProgram) -> None:
    schemes = [*(Schemes(policy=policy) for policy in POLICIES)]
    schemes.append(Schemes(rules=[PlacementRule("output.add", keep="float")]))
    names = [{p.node: p.name for p in place(every_kind, s).values} for s in schemes]
    assert all(found == names[0] for found in names)
    assert len(set(names[0].values())) == len(names[0])


def test_second_factors_are_symmetric_where_asked(every_kind: ExportedProgram) -> None:
    rule = PlacementRule("down.linear", symmetric=False, observer="sqnr")
    for rules, expected in ((), {"down.linear"}), ((rule,), set()):
        schemes = Schemes(rules=rules, symmetric_matmul_second_input=True)
        values = place(every_kind, schemes).marks
        assert {value.name for value in values if value.options.symmetric} == expected
        observers = {value.options.observer for value in values} - {None}
        assert observers == {rule.observer for rule in rules}
    made = simulation(Schemes(symmetric_matmul_second_input=True))
    symmetric = {name for name, q in made.quantizers.items() if q.scheme.symmetric}
    attention = [f"model.layers.{i}.self_attn" for i in range(2)]
    # rotated keys, and values
    assert symmetric == {f"{a}.{name}" for a in attention for name in ("add_1", "v_proj.add")}


def test_a_policy_of_ones_own(every_kind: ExportedProgram) -> None:
    linear, mean = frozenset({"linear"}), frozenset({"mean"})
    rules = (
        PolicyRule(Decision.QUANTIZE, "up", operators=linear, path="up*"),
        PolicyRule(Decision.QUANTIZE, "class", module_class="^OddN", operators=mean),
        PolicyRule(Decision.FLOAT, "the rest"),
    )
    found = decisions(every_kind, policy=Policy("own", rules))
    quantized = {name for name, (decision, _) in found.items() if decision is Decision.QUANTIZE}
    assert quantized == {"up.linear", "norm.mean"}
    with pytest.raises(CalibrationError, match="'open' must end with a rule for every value"):
        Policy("open", rules[:1])
    with pytest.raises(CalibrationError, match="'gpu' is not one of npu, matmul-inputs, weights"):
        place(every_kind, Schemes(policy="gpu"))


def test_values_of_an_adapter_have_bits_of_their_own() -> None:
    rules = [PlacementRule("*.1.self_attn.q_proj.lora_A*", bitwidth=12)]
    made = simulation(Schemes(rules=rules, adapter_activation_bitwidth=8))
    bits = {name: q.scheme.bitwidth for name, q in made.quantizers.items()}
    values = ("lora_A.linear", "lora_B.linear", "mul")
    blocks = [f"model.layers.{i}" for i in range(2)]
    layers = [f"{b}.{layer}" for b in blocks for layer in ("self_attn.q_proj", "mlp.down_proj")]
    narrow = {f"{layer}.{value}" for layer in layers for value in values}
    ruled = "model.layers.1.self_attn.q_proj.lora_A.linear"
    assert bits[ruled] == 12
    assert {name for name in narrow if bits[name] != 8} == {ruled}
    ends = (".lora_A.linear", ".lora_B.linear", "_proj.mul")
    assert {n for n, b in bits.items() if b != 16} == {n for n in bits if n.endswith(ends)}
    assert all(bits[f"{layer}.add"] == 16 for layer in layers)  # the sum with the base layer
    plain = simulation(Schemes())
    assert {q.scheme.bitwidth for q in plain.quantizers.values()} == {16}


def test_users_rules_come_first() -> None:
    rules = [
        PlacementRule("*.0.self_attn.softmax", bitwidth=8, minimum=0, maximum=1),
        PlacementRule("*.softmax", bitwidth=4, observer="percentile"),
        PlacementRule("lm_head", keep="float"),
        PlacementRule("*.1.self_attn.v_proj*", keep="float"),
        PlacementRule("*.lora_A.weight", of="weights", bitwidth=4, symmetric=False),
        PlacementRule("model.layers.1.add", force=True, bitwidth=8),
    ]
    made = simulation(Schemes(rules=rules))
    made.calibrate([batch(seed=s) for s in range(2)])
    layer = "model.layers.{}.self_attn"
    pinned = made.quantizers[f"{layer.format(0)}.softmax"].encoding
    assert pinned is not None
    assert (float(pinned.scale), int(pinned.offset)) == (pytest.approx(1 / 255), 0)
    other = made.quantizers[f"{layer.format(1)}.softmax"]
    assert (other.scheme.bitwidth, other.estimator.name) == (4, "percentile")
    names = [m.name for m in made.marks]
    v_proj = [name for name in names if "1.self_attn.v_proj" in name]
    assert v_proj == [f"{layer.format(1)}.v_proj.weight"]  # packed weights stay
    grids = {n: str(w.encoding.scheme) for n, w in made.weights.items()}
    assert grids["model.layers.0.mlp.down_proj.lora_A.weight"] == "int4 asymmetric per channel"
    assert grids["model.layers.0.mlp.down_proj.lora_B.weight"] == "int8 symmetric per channel"
    assert made.quantizers["model.layers.1.add"].scheme.bitwidth == 8
    assert not {"lm_head.linear", "model.layers.0.add"} & set(names)
    reasons = {p.name: p.reason for p in made.placement.values}
    ruled = "computes new values; rule '*.0.self_attn.softmax'"
    assert reasons[f"{layer.format(0)}.softmax"] == ruled
    assert reasons["lm_head.linear"] == "rule 'lm_head'"
    weight = f"{layer.format(1)}.v_proj.lora_B.weight"
    assert reasons[weight] == "rule '*.1.self_attn.v_proj*'"


@pytest.mark.parametrize(
    ("match", "options", "message"),
    [
        ("*.self_attn.sofmax", {}, r"attn.sofmax' matches no value; .*0.self_attn.softmax"),
        ("*.input_layernorm.pow", {}, r"pow \(inside .*\) and 1 more, but .*\n.*force: true"),
        ("*.q_proj.weight", {"of": "weights"}, r"0.self_attn.q_proj.weight \(a packed weight"),
        ("*.lora_A.weight", {}, r"lora_A.weight \(a weight of the adapter\) and .*\n.*of: weights"),
        ("*.softmax", {}, r"'[*].softmax' .*; rule '\*.softmax'\) and 1 more.*\n.* before the one"),
    ],
)
def test_a_rule_that_does_nothing_is_refused(match: str, options: Any, message: str) -> None:
    rule = PlacementRule(match, bitwidth=6, **options)
    with pytest.raises(CalibrationError, match=message) as caught:
        simulation(Schemes(rules=[PlacementRule("*.softmax", bitwidth=8), rule]))
    assert str(caught.value).startswith("1 placement rules")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"keep": "float", "bitwidth": 8}, "keep: float contradicts bitwidth; remove one"),
        ({"keep": "float", "force": True}, "keep: float contradicts force"),
        ({}, "it has no effect; add keep: float, bitwidth"),
        ({"bitwidth": 17}, "bitwidth 17 is not one of 2 to 16"),
        ({"minimum": 0.5, "maximum": 1.0}, "the range 0.5 to 1.0 must be finite and contain zero"),
        ({"maximum": -1.0}, "the range None to -1.0 must be finite and contain zero"),
        ({"minimum": 0.0, "maximum": 0.0}, "the range 0.0 to 0.0 must"),
        ({"minimum": float("nan")}, "the range nan to None must be finite"),
        ({"minimum": -math.inf, "maximum": math.inf}, "the range -inf to inf must be finite"),
        ({"of": "weights", "observer": "sqnr"}, "observer is for activations"),
    ],
)
def test_rules_that_contradict_themselves(given: dict[str, Any], message: str) -> None:
    with pytest.raises(GridError, match=re.escape(f"rule 'x': {message}"[:-1])):
        PlacementRule("x", **given)
    with pytest.raises(CalibrationError, match="observer 'best' is not one of min-max, percentile"):
        PlacementRule("x", observer="best")


class Timed(nn.Module):
    """Sines and cosines of a time, which may be an integer; a mask that chooses what is added up.

    `shared` is read by more than a sine.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, time: Tensor, ids: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        time = time if time.is_floating_point() else time.float()
        angle = 1000 * time.unsqueeze(-1) * torch.exp(-torch.arange(4.0))
        embedded = self.layer((torch.cat([angle.sin(), angle.cos()], -1) * 0.5).unsqueeze(1))
        scores = embedded.transpose(1, 2) @ embedded
        chosen = (scores + (1 - ids.float()).unsqueeze(1) * -3e38).softmax(-1)
        other = shared * 2
        return chosen @ angle.sin().unsqueeze(1).repeat(1, 8, 1), torch.sin(other) + other


@pytest.mark.parametrize("time", [torch.arange(3), torch.arange(3.0)], ids=["integers", "floats"])
@pytest.mark.parametrize("policy", ["npu", "matmul-inputs"])
def test_angles_and_masks_are_float_and_what_a_product_reads_is_not(
    policy: str, time: Tensor
) -> None:
    given = (time, torch.ones(3, 8, dtype=torch.long), torch.rand(3, 8))
    placement = place(torch.export.export(Timed(), given), Schemes(policy=policy))
    found = {p.node: (p.decision, p.reason) for p in placement.values}
    assert [found[node][0] for node in ("mul_2", "sin_1", "softmax")] == [Decision.QUANTIZE] * 3
    assert [found[node][0] for node in ("unsqueeze_1", "repeat")] == [Decision.SHARE] * 2
    assert found["add"] == (Decision.FLOAT, "combined with a mask")
    for node in ("exp", "mul_3"):  # frequencies, and the mask
        assert found[node] == (Decision.FLOAT, "computed from integers only")
    if policy == "npu" and time.is_floating_point():
        for node in ("time", "mul", "unsqueeze", "mul_1"):
            assert found[node] == (Decision.FLOAT, "an angle: read by sine and cosine only")
        for node in ("shared", "mul_4", "sin", "cos", "cat", "sin_2"):
            assert found[node][0] is Decision.QUANTIZE


LOWEST = torch.finfo(torch.float32).min


class Attention(nn.Module):
    """Scores of `x` with itself, to which `mask` does something; what leaves the softmax is multiplied with `x` again."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.up, self.down, self.mask = nn.Linear(8, 8), nn.Linear(8, 8), mask
        self.sinks = nn.Parameter(torch.randn(1, 1, 1))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.up(x)
        scores, masked = hidden @ hidden.transpose(1, 2), (1 - attention_mask.float()).unsqueeze(1)
        if self.mask == "sinks":
            sinks = self.sinks.expand(len(x), x.shape[1], 1)
            scores = torch.cat([scores + masked * LOWEST, sinks], -1)
            scores = scores - scores.max(-1, keepdim=True).values
            return self.down(scores.softmax(-1)[..., :-1] @ x)
        if self.mask == "sub":
            scores = scores - masked * 3e38
        elif self.mask == "add_":
            scores += masked * LOWEST
        elif self.mask == "masked_fill_":
            scores.masked_fill_(masked.bool(), LOWEST)
        return self.down((scores / 2).softmax(-1) @ x)


def given(seed: int) -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "attention_mask": mask}


def attention(mask: str, *rules: PlacementRule) -> Simulation:
    torch.manual_seed(0)
    model = Attention(mask)
    quantize_(model, "w8-channel", "rtn")
    return simulate(model.eval(), given(0), Schemes(rules=rules))


def relative_error(simulation: Simulation, batch: dict[str, Tensor]) -> float:
    with simulation.only():
        plain = simulation.primary(batch).detach()
    return float((simulation.primary(batch) - plain).norm() / plain.norm())


@pytest.mark.parametrize("mask", ["sinks", "sub", "add_", "masked_fill_"])
def test_masked_scores_are_float_up_to_the_softmax(mask: str) -> None:
    made = attention(mask)
    reasons = {p.operator: p.reason for p in made.placement.values}
    between = {"sinks": {"add", "cat", "max", "sub"}}.get(mask, {mask, "div"})
    masked = {operator for operator, reason in reasons.items() if reason == "combined with a mask"}
    assert masked == between
    assert made.calibrate([given(seed) for seed in range(3)]).masks == ()
    assert "output.softmax" in made.encodings
    assert relative_error(made, given(0)) < 1e-3


@pytest.mark.parametrize("mask", ["sub", "add_", "masked_fill_"])
def test_what_only_a_mask_holds_loses_its_quantizer_whatever_made_it(mask: str) -> None:
    made = attention(mask, PlacementRule("output.*", force=True, bitwidth=16))
    report = made.calibrate([given(seed) for seed in range(3)])
    assert {f"output.{mask}", "output.div"} <= set(report.masks)
    assert relative_error(made, given(0)) < 1e-3
    reasons = {p.name: p.reason for p in made.placement.values}
    assert reasons["output.div"] == "a mask: values beyond 1e30"


def test_a_fixed_range_of_masked_scores_is_kept() -> None:
    rules = (
        PlacementRule("output.add_", force=True, minimum=-50.0, maximum=50.0),
        PlacementRule("output.div", force=True, minimum=-50.0),
    )
    made = attention("add_", *rules)
    assert made.calibrate([given(seed) for seed in range(3)]).masks == ()
    encodings = made.encodings
    assert float(encodings["output.add_"].scale) == pytest.approx(100 / 65535, rel=1e-4)
    assert 50 / 65535 < float(encodings["output.div"].scale) < 60 / 65535
    assert relative_error(made, given(0)) < 1e-3


def test_an_overflow_is_no_mask() -> None:
    made = attention("sub")
    made.observe([given(0)])
    made.quantizers["down.linear"].observer.update(torch.tensor([torch.inf]))
    with pytest.raises(CalibrationError, match=r"down.linear: the observed range is not finite"):
        made.freeze()


def test_a_mask_among_the_inputs_loses_its_quantizer() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2) + mask).softmax(-1)

    mask = torch.where(torch.ones(6, 6).tril() > 0, 0.0, LOWEST)
    batch = {"x": given(0)["x"], "mask": mask.expand(2, 6, 6).contiguous()}
    made = simulate(Masked().eval(), batch)
    assert set(made.calibrate([batch]).masks) == {"mask", "output.add"}
    assert next(p for p in made.placement.values if p.name == "mask").decision is Decision.FLOAT
    assert relative_error(made, batch) < 1e-3


def placed(model: nn.Module) -> list[Any]:
    program = torch.export.export(model, tuple(given(0).values()))
    return place(program, Schemes()).values


def test_what_a_mask_chose_of_the_hidden_states_is_no_score() -> None:
    class Masked(nn.Linear):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return super().forward((x * mask.unsqueeze(-1)).relu()).softmax(-1)

    values = placed(Masked(8, 8))
    assert [p.operator for p in values if p.reason == "combined with a mask"] == ["mul"]
    quantized = {p.operator for p in values if p.decision is Decision.QUANTIZE}
    assert {"relu", "linear", "softmax"} <= quantized


def test_what_integers_look_up_is_no_score() -> None:
    """Relative positions are chosen as masks are; their embedding is added to the scores."""

    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Embedding(4, 1)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            distance = torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]
            bias = self.bias(torch.where(distance > 3, 3, distance).clamp(0, 3)).squeeze(-1)
            scores = x @ x.transpose(1, 2) + bias
            return (scores + (1 - mask.float()).unsqueeze(1) * LOWEST).softmax(-1)

    values = placed(Biased())
    decisions = {p.name: p.decision for p in values}
    assert decisions["bias.embedding"] is decisions["output.add"] is Decision.QUANTIZE
    assert decisions["output.squeeze"] is Decision.SHARE
    assert [p.name for p in values if p.reason == "combined with a mask"] == ["output.add_1"]
