"""Second moments."""

import pytest
import torch

from qwlora.errors import CalibrationError
from qwlora.grid.second_moments import SecondMoment


def seen(*batches: torch.Tensor) -> SecondMoment:
    moment = SecondMoment()
    for batch in batches:
        moment.update(batch)
    return moment


def test_rows_count_alike_unless_told_otherwise() -> None:
    x = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0))
    rows = x.flatten(0, 1)
    assert torch.allclose(seen(x).matrix, rows.T @ rows / len(rows), atol=1e-5)
    assert torch.allclose(seen(x[:1], x[1:]).matrix, seen(x).matrix, atol=1e-5)
    weighted = SecondMoment()
    weighted.update(x, torch.tensor([[2.0], [0.0], [0.0]]).expand(3, 40))
    assert torch.allclose(weighted.matrix, seen(x[0]).matrix, atol=1e-5)


def test_what_has_no_moment_says_so() -> None:
    with pytest.raises(CalibrationError, match="no data was observed"):
        _ = SecondMoment().matrix
    with pytest.raises(CalibrationError, match="nan or infinity"):
        seen(torch.full((2, 4), float("inf")))
    assert torch.equal(seen(torch.zeros(5, 3)).matrix, torch.zeros(3, 3))
