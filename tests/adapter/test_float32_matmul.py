"""oneDNN's float32 matmuls, used only where they are exact."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from qwlora.adapter.training_step import onednn_float32_matmul


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_products_are_float32_and_the_rng_is_untouched() -> None:
    state = torch.get_rng_state()
    with onednn_float32_matmul():
        x, w = (
            torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
        )
        exact = x.double() @ w.double()
        assert (x @ w - exact).abs().max() < 1e-5 * exact.abs().max()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("rounded_bits", "used"),
    [(0, True), (13, False), (16, False)],
    ids=["float32", "TF32", "bfloat16"],
)
def test_reduced_precision_products_are_refused(
    rounded_bits: int, used: bool, monkeypatch: pytest.MonkeyPatch
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
    with onednn_float32_matmul():
        assert torch.get_float32_matmul_precision() == ("medium" if used else "highest")


def test_chosen_precision_and_accelerators_are_left_alone() -> None:
    torch.set_float32_matmul_precision("high")
    with onednn_float32_matmul():
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
    with onednn_float32_matmul("cuda"):
        assert torch.get_float32_matmul_precision() == "highest"


def test_precision_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), onednn_float32_matmul():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
