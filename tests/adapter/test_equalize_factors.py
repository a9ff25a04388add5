"""Rank-space equalization keeps the product and lowers its error on the grid."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from conftest import tiny_model
from qwlora.adapter.adapter_folder import write_adapter
from qwlora.adapter.equalize_factors import Equalization, equalize_adapter_, flat_rotation
from qwlora.errors import CalibrationError, TrainingError
from qwlora.grid.observers import measure
from qwlora.grid.scheme import PerChannel, PerTensor, Scheme
from qwlora.grid.second_moments import Moment, Moments
from qwlora.quantize.quantize_model import quantize_

FOUR, EIGHT = (Scheme(bits, granularity=PerChannel(0)) for bits in (4, 8))


class Layers(nn.Module):
    """One layer of each kind that PEFT adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 24)
        self.linear = nn.Linear(24, 36)
        self.image = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    torch.manual_seed(0)


def linear(rank: int, out: int = 36, columns: int = 24, dora: bool = False) -> PeftModel:
    return get_peft_model(
        nn.Sequential(nn.Linear(columns, out)),
        LoraConfig(
            r=rank, lora_alpha=rank, target_modules=["0"], init_lora_weights=False, use_dora=dora
        ),
    )


def factors(model: PeftModel) -> tuple[Tensor, Tensor]:
    layer = model.base_model.model[0]
    return layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data


def planted(rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Components of very unequal size, distributed between A and B at random."""
    sizes = torch.logspace(0, -3, rank)[torch.randperm(rank, generator=generator)]
    apportioned = torch.logspace(-2, 2, rank)[torch.randperm(rank, generator=generator)]
    a = torch.randn(rank, 24, generator=generator) * (sizes * apportioned).unsqueeze(1)
    return a, torch.randn(36, rank, generator=generator) / apportioned


def loss_on_grid(
    model: PeftModel, scheme: Scheme, product: Tensor, moment: Tensor | None = None
) -> float:
    a, b = (measure(x, scheme).fake_quantize(x).double() for x in factors(model))
    root = (
        torch.eye(24, dtype=torch.float64)
        if moment is None
        else torch.linalg.cholesky(moment.double())
    )
    return float(((b @ a - product) @ root).square().sum() / (product @ root).square().sum())


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 40),
    method=st.sampled_from(["auto", "diagonal", "hadamard"]),
    seed=st.integers(0, 1000),
    zeros=st.integers(0, 3),
    bits=st.sampled_from([4, 6, 8, 16]),
    granularity=st.sampled_from([PerChannel(0), PerTensor()]),
    weighted=st.booleans(),
)
def test_product_is_kept_and_auto_is_never_worse(
    rank: int,
    method: Equalization,
    seed: int,
    zeros: int,
    bits: int,
    granularity: object,
    weighted: bool,
) -> None:
    model, scheme, generator = (
        linear(rank),
        Scheme(bits, granularity=granularity),
        torch.Generator().manual_seed(seed),
    )  # type: ignore[arg-type]
    a, b = planted(rank, generator)
    for factor, index in [(a, slice(0, zeros)), (b.T, slice(zeros, zeros + 1))]:
        factor[index] = 0
    for stored, value in zip(factors(model), (a, b), strict=True):
        stored.copy_(value)
    product = b.double() @ a.double()
    x = torch.randn(100, 24, generator=generator) * torch.logspace(0, -1, 24)
    moment = x.T @ x / 100 if weighted else None
    moments = Moments()
    if moment is not None:
        moments.put("0", Moment(moment, torch.eye(len(b))))
    before = loss_on_grid(model, scheme, product, moment) if product.any() else 0.0

    report = equalize_adapter_(model, scheme, method, moments)["0"]

    new_a, new_b = (x.double() for x in factors(model))
    sizes = (new_b.abs() @ new_a.abs()).clamp(min=1e-30)  # what float32 rounds each product against
    assert bool(
        ((new_b @ new_a - product).abs() <= 1e-6 * sizes.maximum(product.abs().max())).all()
    )
    assert bool(new_a.isfinite().all() and new_b.isfinite().all())
    after = loss_on_grid(model, scheme, product, moment) if product.any() else 0.0
    assert report.before == pytest.approx(before, rel=1e-3, abs=1e-12)
    assert report.after == pytest.approx(after, rel=1e-3, abs=1e-12)
    if method == "auto":
        assert report.after <= report.before
        assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("rank", [16, 12, 5])
def test_makes_an_unequal_adapter_usable_at_4_bits(rank: int) -> None:
    a, b = planted(rank, torch.Generator().manual_seed(3))
    errors: dict[str, float] = {}
    for method in ("none", "diagonal", "hadamard", "auto"):
        model = linear(rank)
        for stored, value in zip(factors(model), (a, b), strict=True):
            stored.copy_(value)
        equalize_adapter_(model, FOUR, method)
        errors[method] = loss_on_grid(model, FOUR, b.double() @ a.double())
    assert errors["auto"] == min(errors.values())
    assert errors["auto"] < 0.01 < 0.1 < errors["none"]
    assert errors["diagonal"] < errors["none"] / 3


def test_diagonal_equalizes_the_dominant_term() -> None:
    """If only B is on a coarse grid, its columns become equally long.

    If only the activation is, the ranges of its components become equal.
    """
    a, b = planted(8, torch.Generator().manual_seed(5))
    ranges = {}
    for name, weights, rank_space in (
        ("weights", EIGHT, None),
        ("activation", Scheme(16, granularity=PerChannel(0)), Scheme(4, symmetric=False)),
    ):
        model = linear(8)
        for stored, value in zip(factors(model), (a, b), strict=True):
            stored.copy_(value)
        equalize_adapter_(model, weights, "diagonal", rank_space=rank_space)
        new_a, new_b = factors(model)
        ranges[name] = [float(x.max() / x.min()) for x in (new_a.norm(dim=1), new_b.norm(dim=0))]
    assert ranges["weights"][1] < 10 < 100 < ranges["weights"][0]
    assert ranges["activation"][0] < 1.01 < 100 < ranges["activation"][1]


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 12, 15, 64])
def test_rotation_is_orthogonal_and_flat(rank: int) -> None:
    rotation = flat_rotation(rank)
    assert torch.allclose(rotation @ rotation.T, torch.eye(rank, dtype=torch.float64), atol=1e-12)
    odd = rank
    while odd % 2 == 0:
        odd //= 2
    bound = (2 if odd > 1 else 1) ** 0.5 / rank**0.5
    assert float(rotation.abs().max()) <= bound + 1e-12
    if odd == 1:
        assert torch.allclose(rotation.abs(), torch.full_like(rotation, rank**-0.5))


def test_equalizes_embeddings_and_convolutions_but_not_grouped_ones() -> None:
    model = get_peft_model(
        Layers(),
        LoraConfig(
            r=6, lora_alpha=12, target_modules=["table", "linear", "image"], init_lora_weights=False
        ),
    )
    layers = {
        name: model.base_model.model.get_submodule(name) for name in ("table", "linear", "image")
    }
    before = {name: layer.get_delta_weight("default") for name, layer in layers.items()}
    old = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    reports = equalize_adapter_(model, FOUR, "hadamard")
    assert set(reports) == set(layers)
    for name, layer in layers.items():
        assert torch.allclose(layer.get_delta_weight("default"), before[name], atol=1e-5)
    assert not any(
        torch.equal(p, old[name]) for name, p in model.named_parameters() if "lora_" in name
    )

    with pytest.warns(UserWarning, match="groups"):
        grouped = get_peft_model(
            Layers(), LoraConfig(r=8, target_modules=["grouped"], init_lora_weights=False)
        )
    assert equalize_adapter_(grouped, FOUR) == {}


def test_shared_factors_are_not_equalized() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)),
        LoraConfig(r=4, target_modules=["0", "1"], init_lora_weights=False),
    )
    first, second = model.base_model.model
    second.lora_A["default"].weight = first.lora_A["default"].weight
    kept = first.lora_A["default"].weight.clone()
    assert equalize_adapter_(model, FOUR, "hadamard") == {}
    assert torch.equal(first.lora_A["default"].weight, kept)


def test_dora_output_is_unchanged() -> None:
    model = linear(8, dora=True)
    x = torch.randn(5, 24)
    before = model(x)
    assert equalize_adapter_(model, FOUR, "hadamard")["0"].method == "hadamard"
    assert torch.allclose(model(x), before, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_model_output_is_unchanged_and_peft_loads_the_adapter(
    architecture: str, tmp_path: object
) -> None:
    model = tiny_model(architecture)
    quantize_(model, "w4-block32")
    plain = copy.deepcopy(model)
    adapted = get_peft_model(
        model, LoraConfig(r=6, target_modules="all-linear", init_lora_weights=False)
    ).eval()
    ids = torch.randint(0, 250, (2, 12))
    with torch.no_grad():
        before = adapted(ids).logits
        reports = equalize_adapter_(adapted, FOUR)
        after = adapted(ids).logits
        assert {report.method for report in reports.values()} & {"diagonal", "hadamard"}
        assert len(reports) == sum("lora_A" in name for name, _ in adapted.named_parameters())
        assert torch.allclose(after, before, atol=1e-3 * float(before.abs().max()))
        write_adapter(adapted, tmp_path)  # type: ignore[arg-type]
        assert torch.equal(
            PeftModel.from_pretrained(plain, str(tmp_path)).eval()(ids).logits, after
        )


def test_zero_adapter_is_unchanged() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(24, 36)), LoraConfig(r=4, target_modules=["0"]))
    kept = [x.clone() for x in factors(model)]
    report = equalize_adapter_(model, FOUR)["0"]
    assert (report.method, report.before, report.after) == ("none", 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(factors(model), kept, strict=True))
    assert equalize_adapter_(linear(4), FOUR, "none") == {}


def test_only_the_named_adapter_changes() -> None:
    model = linear(4)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    kept = [x.clone() for x in factors(model)]
    equalize_adapter_(model, EIGHT, "hadamard", adapter="other")
    assert all(torch.equal(a, b) for a, b in zip(factors(model), kept, strict=True))


def test_errors_name_the_reason() -> None:
    with pytest.raises(TrainingError, match="the model has no adapter 'summary'; it has default"):
        equalize_adapter_(linear(4), FOUR, adapter="summary")
    model = linear(4)
    factors(model)[1][0, 0] = torch.nan
    with pytest.raises(
        CalibrationError,
        match="0: lora_A or lora_B contains nan or infinity; train the adapter again",
    ):
        equalize_adapter_(model, FOUR)
