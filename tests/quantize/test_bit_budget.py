"""A bitwidth and a block size for each layer, by what they cost."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from conftest import EACH_ARCHITECTURE, byte_tokenizer, tiny_model
from formats.test_precomputed import Held
from qwlora import fingerprint, quantize_
from qwlora.analysis.token_scores import logits_of, score_tokens
from qwlora.errors import GridError
from qwlora.grid.scheme import parse_scheme
from qwlora.quantize.bit_budget import BitBudget, _Choice, _knapsack
from qwlora.quantize.layer_rules import LayerRule
from qwlora.quantize.quantize_model import QuantizeReport, quantize_checkpoint

SCHEMES = [parse_scheme(f"w{bits}-block{size}") for bits in (2, 3, 5) for size in (32, 64)]


def ids(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 250, (count, 24), generator=torch.Generator().manual_seed(seed))


def with_budget(
    model: PreTrainedModel, bits: float, solver: str = "gptq", **more: Any
) -> QuantizeReport:
    budget = BitBudget(bits, schemes=SCHEMES)
    return quantize_(model, "w4-block32", solver, calibration=ids(), budget=budget, **more)


def uneven(seed: int = 0) -> PreTrainedModel:
    """Its second block adds little to what the first one gave."""
    model = tiny_model("llama", seed)
    for layer in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
        layer.weight.data *= 0.1
    return model


def divergence(model: nn.Module) -> float:
    scores = score_tokens(logits_of(model), ids(8, 1), "", reference=logits_of(uneven()))
    return float(scores.to_json()["kl"]["mean"])


@pytest.mark.parametrize("solver", ["gptq", pytest.param("search", marks=pytest.mark.slow)])
def test_it_beats_the_same_bits_everywhere_where_layers_differ(solver: str) -> None:
    uniform, chosen = uneven(), uneven()
    even = quantize_(uniform, "w3-block32", solver, calibration=ids())
    report = with_budget(chosen, even.size.bits_per_weight, solver)
    assert report.size.bytes <= even.size.bytes
    assert divergence(chosen) < 0.5 * divergence(uniform)


@pytest.mark.parametrize("architecture", EACH_ARCHITECTURE)
def test_the_budget_is_met_and_layers_that_read_one_tensor_agree(architecture: str) -> None:
    report = with_budget(tiny_model(architecture, layers=1), 3.4)
    assert 3.2 < report.size.bits_per_weight <= 3.4
    schemes = {name.removesuffix(".weight"): r.scheme for name, r in report.layers.items()}
    for fused in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        assert len({s for name, s in schemes.items() if name.endswith(fused)}) <= 1


def test_its_rules_make_the_same_base_without_it_and_so_do_files(tmp_path: Path) -> None:
    model, again, files = (uneven() for _ in range(3))
    fixed = [LayerRule("*.layers.0.mlp.up_proj", parse_scheme("w8-channel"))]
    report = with_budget(model, 4.0, rules=fixed)
    assert report.layers["model.layers.0.mlp.up_proj.weight"].scheme == "int8 symmetric per channel"
    assert len(report.budget_rules) < len(report.layers)
    how: dict[str, Any] = {"scheme": "w4-block32", "solver": "gptq", "calibration": ids()}
    quantize_(again, rules=[*fixed, *report.budget_rules], **how)
    assert fingerprint(again) == fingerprint(model)
    how |= {"rules": fixed, "budget": BitBudget(4.0, schemes=SCHEMES)}
    found = quantize_checkpoint(Held(files), byte_tokenizer(), tmp_path, "x", **how)
    assert found == (fingerprint(model), report)


def test_an_impossible_budget_is_refused_with_what_is_possible() -> None:
    for bits in (2.2, 5.6):
        with pytest.raises(GridError, match=rf"{bits} bits .* take 2\.25 to 5\.5 \(.* kB to"):
            with_budget(tiny_model("llama", layers=1), bits)
    report = with_budget(tiny_model("llama", layers=1), 2.25)
    assert report.size.bits_per_weight == 2.25


CHOICES = st.tuples(st.integers(1, 50), st.integers(0, 1000))


@settings(max_examples=50)
@given(st.lists(st.lists(CHOICES, min_size=1, max_size=3), min_size=1, max_size=4), st.floats(0, 1))
def test_no_other_choice_of_that_size_costs_less(rows: Any, share: float) -> None:
    scheme = parse_scheme("w4-tensor")
    groups = [[_Choice(scheme, *pair) for pair in row] for row in rows]
    sizes = [[choice.size for choice in group] for group in groups]
    least, most = (sum(map(extreme, sizes)) for extreme in (min, max))
    room = least + int(share * (most - least))
    (size, cost), *others = (
        (sum(c.size for c in choices), sum(c.cost for c in choices))
        for choices in [_knapsack(groups, room), *itertools.product(*groups)]
    )
    assert size <= room
    assert cost == min(other for needed, other in others if needed <= room)
