"""Activation checkpoints in memory mappings: the same bits."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ARCHITECTURES, tiny_model
from qwlora.adapter import activation_checkpointing
from qwlora.adapter.activation_checkpointing import mmap_checkpoints


def gradients(architecture: str, active: bool) -> dict[str, Tensor]:
    model = tiny_model(architecture).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, hooks = (
        torch.arange(64).view(2, 32),
        [len(layer._forward_hooks) for layer in model.modules()],
    )
    with torch.random.fork_rng(), mmap_checkpoints(model) if active else contextlib.nullcontext():
        torch.manual_seed(0)  # GPT-2 has dropout
        model(input_ids=ids, labels=ids).loss.backward()
    assert [len(layer._forward_hooks) for layer in model.modules()] == hooks
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_bitwise_equal(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    own = activation_checkpointing._MappedCopy.apply
    monkeypatch.setattr(activation_checkpointing, "_MIN_COPY_BYTES", 1)
    monkeypatch.setattr(
        activation_checkpointing._MappedCopy,
        "apply",
        lambda x, trims: copied.append(x.nbytes) or own(x, trims),
    )
    expected, found = gradients(architecture, active=False), gradients(architecture, active=True)
    assert len(copied) >= 2
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_copies_only_large_outputs_while_training() -> None:
    class Layer(torch.nn.Module):
        gradient_checkpointing = True

    layer: Any = Layer()
    x = torch.randn(2**20, requires_grad=True)
    copied = activation_checkpointing._copy_output(True, layer, (), (x * 2, "more"))
    assert copied[1] == "more"
    assert torch.equal(copied[0], x * 2)
    assert copied[0].untyped_storage().data_ptr() % 4096 == 0
    copied[0].sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))  # type: ignore[arg-type]
    assert activation_checkpointing._copy_output(True, layer.eval(), (), x) is None
    assert activation_checkpointing._copy_output(True, layer.train(), (), x[:10]) is None
    with torch.no_grad():
        assert activation_checkpointing._copy_output(True, layer, (), x) is None


@pytest.mark.parametrize(("worth", "trims"), [(1, 3), (2**40, 0)])
def test_trims_after_every_third_large_layer_in_both_passes(
    worth: int, trims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(activation_checkpointing, "return_freed_memory", lambda: trimmed.append(1))
    monkeypatch.setattr(activation_checkpointing, "_MIN_COPY_BYTES", 1)
    monkeypatch.setattr(activation_checkpointing, "_MIN_TRIM_BYTES", worth)
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
    with mmap_checkpoints(model):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert len(trimmed) == trims
        loss.backward()
    assert len(trimmed) == 2 * trims
