"""Ranks by layer are optimal within the budget and give a plain PEFT adapter."""

from __future__ import annotations

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from conftest import tiny_model
from qwlora import RankBudget, fingerprint, quantize_, rank_by_layer
from qwlora.adapter.attach import LoraShape, attach
from qwlora.adapter.initialize import initialize_adapter_
from qwlora.adapter.rank_budget import rank_gains, spread_ranks, with_ranks
from qwlora.errors import RecipeError, TrainingError
from qwlora.formats.base_folder import load_base
from qwlora.grid.second_moments import Moment, Moments
from qwlora.nn import weight_out_in
from qwlora.pipeline.run_job import run
from qwlora.recipe import load_recipe


def total(gains: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(sum(gains[name][:rank]) for name, rank in ranks.items())


def spent(costs: dict[str, int], ranks: dict[str, int]) -> int:
    return sum(costs[name] * rank for name, rank in ranks.items())


def best(gains: dict[str, list[float]], costs: dict[str, int], budget: int) -> float:
    """The optimum over all combinations."""
    choices = itertools.product(*(range(1, len(g) + 1) for g in gains.values()))
    affordable = (dict(zip(gains, c, strict=True)) for c in choices)
    return max(total(gains, ranks) for ranks in affordable if spent(costs, ranks) <= budget)


def cases(equal_costs: bool) -> list[tuple[dict[str, list[float]], dict[str, int], int]]:
    draw = random.Random(0)
    found = []
    for _ in range(60):
        names = "abcd"[: draw.randint(2, 4)]
        gains = {
            n: sorted(
                (draw.expovariate(1) * draw.choice([1, 10]) for _ in range(draw.randint(1, 5))),
                reverse=True,
            )
            for n in names
        }
        costs = {n: 7 if equal_costs else draw.randint(3, 12) for n in names}
        found.append((gains, costs, sum(costs.values()) + draw.randint(0, 80)))
    return found


def test_equal_costs_give_the_optimum() -> None:
    for gains, costs, budget in cases(equal_costs=True):
        ranks = spread_ranks(gains, costs, budget)
        assert total(gains, ranks) == pytest.approx(best(gains, costs, budget))


def test_other_costs_miss_the_optimum_by_less_than_one_gain() -> None:
    for gains, costs, budget in cases(equal_costs=False):
        ranks = spread_ranks(gains, costs, budget)
        assert spent(costs, ranks) <= budget
        assert all(1 <= rank <= len(gains[name]) for name, rank in ranks.items())
        assert not any(
            rank < len(gains[n]) and costs[n] <= budget - spent(costs, ranks)
            for n, rank in ranks.items()
        ), "something still fits"
        assert total(gains, ranks) > best(gains, costs, budget) - max(
            max(g) for g in gains.values()
        )


def test_an_exactly_spent_budget_gives_the_optimum() -> None:
    checked = 0
    for gains, costs, budget in cases(equal_costs=False):
        order = sorted(
            ((g / costs[n], n) for n, values in gains.items() for g in values[1:]), reverse=True
        )
        exact = sum(costs.values()) + sum(costs[n] for _, n in order[:3])
        if exact <= budget:
            checked += 1
            assert total(gains, spread_ranks(gains, costs, exact)) == pytest.approx(
                best(gains, costs, exact)
            )
    assert checked > 20


def test_ties_go_to_the_earlier_layer_and_a_small_budget_is_refused() -> None:
    gains, costs = {"b": [1.0, 1.0], "a": [1.0, 1.0]}, {"b": 5, "a": 5}
    assert spread_ranks(gains, costs, 15) == {"b": 2, "a": 1}
    with pytest.raises(
        TrainingError,
        match="a budget of 9 parameters does not give each of 2 layers a rank of 1, which takes 10",
    ):
        spread_ranks(gains, costs, 9)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_gains_are_squared_singular_values_over_the_energy(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, quantized = (torch.randn(shape, generator=generator) for _ in range(2))
    singular = torch.linalg.svdvals(weight - quantized).double()
    found = rank_gains(weight, weight - quantized, 6)
    assert found == pytest.approx(
        (singular[:6].square() / float(weight.square().sum())).tolist(), rel=1e-3
    )
    assert len(rank_gains(weight, weight - quantized, 100)) == 24
    r, g = (
        x.T @ x
        for x in (
            torch.randn(300, n, generator=generator) @ torch.randn(n, n, generator=generator)
            for n in shape[::-1]
        )
    )
    inner, outer = (
        torch.linalg.cholesky(m + share * m.diagonal().mean() * torch.eye(len(m)))
        for m, share in ((r, 0.1), (g, 1.0))
    )
    whole, lost = ((outer.T @ matrix @ inner).double() for matrix in (weight, weight - quantized))
    singular = torch.linalg.svdvals(lost)
    assert rank_gains(weight, weight - quantized, 6, Moment(r, g)) == pytest.approx(
        (singular[:6].square() / whole.square().sum()).tolist(), rel=1e-3
    )
    assert sum(rank_gains(weight, weight - quantized, 24, Moment(r, g))) == pytest.approx(
        float(lost.square().sum() / whole.square().sum()), rel=1e-3
    )


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_by_layer_correct_more_at_the_same_size(rslora: bool, tmp_path: Path) -> None:
    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    with torch.no_grad():  # one layer has lost much more than the others
        reference.model.layers[1].mlp.up_proj.weight.add_(
            torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) * 0.05
        )
    quantize_(model, "w4-block32")
    identity, shape = fingerprint(model), LoraShape(4, 8, rslora=rslora)
    uniform = attach(model, shape, seed=0)

    def weight(path: str) -> torch.Tensor:
        return weight_out_in(reference.get_submodule(path)).detach()

    def scalings(adapted: PeftModel) -> dict[str, float]:
        return {
            n: m.scaling["default"] for n, m in adapted.named_modules() if isinstance(m, LoraLayer)
        }

    ranks = rank_by_layer(uniform, RankBudget(1.0, 16), weight)
    assert ranks == rank_by_layer(uniform, RankBudget(1.0, 16), weight)
    before = scalings(uniform)
    count = sum(p.numel() for p in uniform.parameters() if p.requires_grad)
    errors = sum(r.after for r in initialize_adapter_(uniform, "svd", weight, share=1).values())
    chosen = attach(uniform.unload(), with_ranks(shape, ranks), seed=0)
    assert fingerprint(chosen) == identity
    assert 0.95 * count < sum(p.numel() for p in chosen.parameters() if p.requires_grad) <= count
    assert scalings(chosen) == pytest.approx(before)
    assert max(ranks, key=ranks.__getitem__) == "model.layers.1.mlp.up_proj"
    assert min(ranks.values()) >= 1
    assert max(ranks.values()) <= 16
    assert (
        sum(r.after for r in initialize_adapter_(chosen, "svd", weight, share=1).values()) < errors
    )
    chosen.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))
    found = {
        n.removeprefix("base_model.model."): m.r["default"]
        for n, m in loaded.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert found == ranks


def test_refuses_a_model_without_quantized_layers() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    with pytest.raises(
        TrainingError, match="no layer with adapter 'default' is quantized; give one rank for all"
    ):
        rank_by_layer(model, RankBudget(1.0, 16), lambda path: torch.empty(0), Moments())


@pytest.mark.parametrize("init", ["svd", "qera"])
def test_rank_budget_by_recipe(recipe_for: Any, tmp_path: Path, init: str) -> None:
    adapter = {
        "name": "first",
        "rank": 4,
        "init": init,
        "rank_budget": 0.5,
        "steps": 2,
        "warmup_steps": 0,
    }
    results = run(
        load_recipe(recipe_for(adapters=[adapter])), tmp_path / "out", ("quantize", "train")
    )
    started = results["train"]["first"]["init"]
    assert started["method"] == init
    assert started["ranks"].keys() == started["layers"].keys()
    assert len(set(started["ranks"].values())) > 1
    assert all(layer["after"] < layer["before"] for layer in started["layers"].values())
    config = json.loads(
        (tmp_path / "out" / "adapters" / "first" / "adapter_config.json").read_text()
    )
    assert config["rank_pattern"] == started["ranks"]
    assert config["alpha_pattern"] == {path: 8.0 * rank for path, rank in started["ranks"].items()}
    base = load_base(tmp_path / "out" / "base")
    whole = sum(
        p.numel()
        for p in get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")).parameters()
        if p.requires_grad
    )
    assert 0.4 * whole < results["train"]["first"]["trainable_parameters"] <= 0.5 * whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "{rank_budget: 1.0}",
            "init zero corrects nothing; set init to svd or qera",
        ),
        (
            "{rank_budget: 1.0, init: svd, rank_pattern: {q_proj: 2}}",
            "rank_budget sets rank_pattern and alpha_pattern itself",
        ),
        (
            "{rank_budget: 0.2, init: svd, rank: 4}",
            "rank_budget 0.2 of rank 4 is less than rank 1 per layer; raise it to 0.25",
        ),
        (
            "{rank_budget: 1.0, init: svd, rank: 4, rank_cap: 3}",
            "rank_cap 3 in every layer is less than rank_budget 1 of rank 4; raise rank_cap",
        ),
        (
            "{rank_budget: 5, init: svd}",
            "rank_budget 5 exceeds the default rank_cap of four times rank",
        ),
        (
            "{init_share: 0.25}",
            "init_share has no effect with init zero",
        ),
        ("{init_share: 0, init: svd}", "init_share"),
        (
            "{rank_budget: 1.0, init: svd, init_share: 0.25}",
            "init_share has no effect with rank_budget",
        ),
        ("{rank_cap: 8, init: svd}", "rank_cap needs rank_budget"),
        (
            "{rank_budget: 1.0, continue_from: a/b}",
            "rank_budget: with start, these come from that adapter",
        ),
    ],
)
def test_recipe_problems_are_found_first(recipe_for: Any, change: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_for(), (f"adapters.0={{name: a, {change[1:]}",))
    assert message in "\n".join(caught.value.problems)
