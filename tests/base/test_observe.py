"""How much each token matters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qwlora.base.lockstep import Lockstep
from qwlora.base.observe import observe
from qwlora.errors import CalibrationError
from qwlora.grid.moment import SecondMoment


class Part(nn.Module):
    """A layer, and what a model makes of it."""

    def __init__(self, then: Callable[[Tensor], Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.then = nn.Linear(8, 400, bias=False), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.layer(x))


def observed(then: Callable[[Tensor], Tensor], *batches: Tensor) -> SecondMoment:
    """Of the only layer of a model with one part."""
    model = nn.Sequential(Part(then))
    with Lockstep(model, ["0"], [{"input": batch} for batch in batches]) as lockstep:
        lockstep.advance()
        found = observe(model, "0", ["0.layer.weight"], lockstep)
        lockstep.advance()
    return found["0.layer.weight"]


def rows(seed: int = 0) -> Tensor:
    return torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(seed))


def test_a_token_weighs_what_its_error_moves_in_the_output_relative_to_that() -> None:
    x = rows()
    y = nn.Sequential(Part(nn.Identity()))(x)[0].detach()
    expected = x[0].T @ (x[0] * (400 / y.square().sum(-1, keepdim=True))) / (400 / y.square().sum(-1)).sum()
    error = (observed(nn.Identity(), x).matrix - expected).norm() / expected.norm()
    assert error < 0.05, "one probe of 400 outputs is within some percent of the mean"


def test_what_all_tokens_read_is_all_that_counts() -> None:
    x = rows()
    torch.testing.assert_close(observed(lambda z: z[:, :1].expand_as(z), x).matrix, x[0, 0].outer(x[0, 0]))


def test_a_token_with_a_huge_output_hardly_counts_and_one_of_zeros_is_no_infinity() -> None:
    x = rows()
    spiked, silent = x.clone(), x.clone()
    spiked[0, 0] *= 5000
    silent[0, 0] = 0
    without, *others = (moment / moment.trace() for moment in (observed(nn.Identity(), batch).matrix for batch in (x[:, 1:], spiked, silent)))
    assert all((other - without).norm() < 0.3 * without.norm() for other in others)


def test_changes_in_place_batches_and_layers_that_nothing_reads() -> None:
    whole = observed(torch.relu, rows(0), rows(1))
    torch.testing.assert_close(observed(torch.relu_, rows(0), rows(1)).matrix, whole.matrix)
    assert whole.tokens == 40
    assert torch.equal(observed(lambda z: z.detach() + torch.zeros(1, requires_grad=True), rows()).matrix, torch.zeros(8, 8))


def test_a_part_that_cannot_be_differentiated_is_named() -> None:
    with pytest.raises(CalibrationError, match="0 cannot be differentiated, which solver gptq and init qera need; use solver search"):
        observed(torch.Tensor.detach, rows())
