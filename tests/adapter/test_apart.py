"""Checkpoints in mappings of their own: the same numbers."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ARCHITECTURES, tiny_model
from qwlora.adapter import activation_checkpointing as apart
from qwlora.adapter.activation_checkpointing import kept_apart


def gradients(architecture: str, active: bool) -> dict[str, Tensor]:
    model = tiny_model(architecture).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, hooks = (
        torch.arange(64).view(2, 32),
        [len(layer._forward_hooks) for layer in model.modules()],
    )
    with torch.random.fork_rng(), kept_apart(model) if active else contextlib.nullcontext():
        torch.manual_seed(0)  # GPT-2 has dropout
        model(input_ids=ids, labels=ids).loss.backward()
    assert [len(layer._forward_hooks) for layer in model.modules()] == hooks
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same_bits(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    own = apart._Moved.apply
    monkeypatch.setattr(apart, "_LARGE_BYTES", 1)
    monkeypatch.setattr(
        apart._Moved, "apply", lambda x, trims: moved.append(x.nbytes) or own(x, trims)
    )
    expected, found = gradients(architecture, active=False), gradients(architecture, active=True)
    assert len(moved) >= 2
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_what_is_moved_and_what_is_not() -> None:
    class Layer(torch.nn.Module):
        gradient_checkpointing = True

    layer: Any = Layer()
    x = torch.randn(2**20, requires_grad=True)
    moved = apart._move(True, layer, (), (x * 2, "more"))
    assert moved[1] == "more"
    assert torch.equal(moved[0], x * 2)
    assert moved[0].untyped_storage().data_ptr() % 4096 == 0
    moved[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))  # type: ignore[arg-type]
    assert apart._move(True, layer.eval(), (), x) is None
    assert apart._move(True, layer.train(), (), x[:10]) is None
    with torch.no_grad():
        assert apart._move(True, layer, (), x) is None


@pytest.mark.parametrize(("worth", "trims"), [(1, 3), (2**40, 0)])
def test_holes_go_back_after_every_third_large_layer_of_either_pass(
    worth: int, trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(apart, "give_back", lambda: trimmed.append(1))
    monkeypatch.setattr(apart, "_LARGE_BYTES", 1)
    monkeypatch.setattr(apart, "_WORTH_TRIMMING", worth)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "vocab_size": 300,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.arange(64).view(2, 32)
    with kept_apart(model):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert len(trimmed) == trims
        loss.backward()
    assert len(trimmed) == 2 * trims
