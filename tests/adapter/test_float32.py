"""oneDNN's float32 products, where they are float32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qwlora.adapter.float32_matmul import float32_by_onednn


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_products_inside_are_float32_and_random_numbers_are_not_used() -> None:
    state = torch.get_rng_state()
    with float32_by_onednn():
        x, w = (
            torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
        )
        exact = x.double() @ w.double()
        assert (x @ w - exact).abs().max() < 1e-5 * exact.abs().max()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rounded_bits", "taken"),
    [(0, True), (13, False), (16, False)],
    ids=["float32", "TF32", "bfloat16"],
)
def test_a_product_that_rounds_what_it_multiplies_is_not_taken(
    rounded_bits: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.Tensor.__matmul__

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest":
            return own(x, w)
        return own(
            *(
                (t.contiguous().view(torch.int32) >> rounded_bits << rounded_bits).view(
                    torch.float32
                )
                for t in (x, w)
            )
        )

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    with float32_by_onednn():
        assert torch.get_float32_matmul_precision() == ("medium" if taken else "highest")


def test_who_chose_a_precision_and_accelerators_keep_theirs() -> None:
    torch.set_float32_matmul_precision("high")
    with float32_by_onednn():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    with float32_by_onednn("cuda"):
        assert torch.get_float32_matmul_precision() == "highest"


def test_it_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), float32_by_onednn():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
