"""Masked scores: no grid holds them beside the rest, so they stay float from where they meet the mask to the softmax, whatever lies between."""

from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor, nn

from qwlora import PlacementRule, Schemes, quantize_, simulate
from qwlora.errors import CalibrationError
from qwlora.graph.capturable_model import visible_implementations
from qwlora.graph.value_traits import Decision
from qwlora.simulation.placement import place
from qwlora.simulation.simulation import Simulation
from simulation.tiny_architectures import DECODER, VOCABULARY

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


def test_attention_sinks_of_a_model() -> None:
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = t.GptOssConfig(**DECODER, **experts, head_dim=16, sliding_window=8)
    config._attn_implementation = "eager"
    model = t.GptOssForCausalLM(config)
    quantize_(model, "w4-block32", solver="rtn")
    ids = torch.randint(3, VOCABULARY, (2, 12))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    made = simulate(model.eval(), batch)
    made.calibrate([batch])
    with torch.no_grad(), visible_implementations(model):
        expected = model(**batch, use_cache=False).logits
    assert float((made.logits(ids) - expected).norm() / expected.norm()) < 1e-2
