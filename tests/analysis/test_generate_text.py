"""Text that a model writes by itself."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import byte_tokenizer, tiny_model
from qwlora.analysis.generate_text import SAMPLED_AT_ONCE, sample_sequences
from qwlora.errors import NonFiniteError


class OfLogits(nn.Module):
    """A model without a cache."""

    def __init__(self, compute: Callable[[Tensor], Tensor]):
        super().__init__()
        self.compute = compute

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.compute(input_ids))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_near_temperature_zero_it_writes_what_transformers_generates(architecture: str) -> None:
    model, tokenizer = tiny_model(architecture, layers=1), byte_tokenizer()
    ids = sample_sequences(model, tokenizer, SAMPLED_AT_ONCE + 1, 12, temperature=1e-6)
    assert ids.shape == (SAMPLED_AT_ONCE + 1, 12)
    assert not set(ids[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert len(set(ids[:, 0].tolist())) > SAMPLED_AT_ONCE / 2
    model.generation_config.eos_token_id = None
    generated = model.generate(
        ids[:, :1], attention_mask=torch.ones_like(ids[:, :1]), do_sample=False, max_new_tokens=11
    )
    assert torch.equal(generated, ids)


@pytest.mark.filterwarnings("error::FutureWarning")  # the cache by the name of the model
def test_equal_seeds_write_equal_text_with_and_without_a_cache() -> None:
    model, tokenizer = tiny_model("llama", layers=1), byte_tokenizer()

    without_cache = OfLogits(lambda ids: model(ids).logits)
    state = torch.get_rng_state()
    first, again, other = (sample_sequences(model, tokenizer, 3, 12, seed=s) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, sample_sequences(without_cache, tokenizer, 3, 12, seed=1))
    assert torch.equal(state, torch.get_rng_state())


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])

    fixed = OfLogits(lambda ids: logits.expand(*ids.shape, 4))
    ids = sample_sequences(fixed, byte_tokenizer(), 64, 32, temperature=2.0)[:, 1:]
    shares = ids.flatten().bincount(minlength=4) / ids.numel()
    torch.testing.assert_close(shares, (logits / 2).softmax(-1), rtol=0, atol=0.05)


def test_a_model_that_is_broken_writes_nothing() -> None:
    model = tiny_model("llama", layers=1)
    model.lm_head.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"base\.calibration: \[job\]"):
        sample_sequences(model, byte_tokenizer(), 1, 8)
