"""Limits of a proof for simulated activations."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Binomial

from qwlora.export.proof import DECODED, broken_limits


@pytest.mark.parametrize("floor", [0.999, 0.97, 0.9, 0.6])
def test_tokens_decoded_one_by_one_may_differ_as_chance_has_it(floor: float) -> None:
    same = {
        "max_log_prob_difference": 0.0,
        "top1_agreement": 1.0,
        "perplexity": 9.0,
        "reference_perplexity": 9.0,
    }
    state = {"top": torch.zeros(1), "largest": torch.ones(1), "floor": torch.tensor([floor, 0.01])}
    reference = {f"adapter.{key}": value for key, value in state.items()}
    chances = Binomial(DECODED, torch.tensor(floor)).log_prob(torch.arange(DECODED + 1.0)).exp()

    def is_broken(right: int) -> bool:
        exact = {"adapter": same, "decode_agreement": right / DECODED}
        return bool(list(broken_limits({"exact": exact}, reference, 0.003)))

    for right in range(DECODED + 1):
        is_chance = chances[: right + 1].sum() > 0.025
        assert is_broken(right) == (right < 0.9 * DECODED and not is_chance)
