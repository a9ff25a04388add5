"""`memory_saving` in a user's own loop: PEFT's results; nothing stays replaced afterwards."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import qwlora
from conftest import tiny_model
from qwlora.adapter.chunked_loss import ChunkedLoss
from qwlora.nn.packed_matmul import LinearAddFunction


def weight_changes(lean: bool, half: bool, chunked: bool = True) -> dict[str, Tensor]:
    """Change of each adapter weight over three steps."""
    model: Any = tiny_model("llama")
    qwlora.quantize_(model, "w4-block32", "rtn")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    ids, before = torch.arange(64).view(2, 32), patched_state(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with (
        qwlora.memory_saving(model, half, chunked_loss=chunked)
        if lean
        else contextlib.nullcontext()
    ):
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert patched_state(model) == before
    return {
        name: p.detach() - start[name] for name, p in model.named_parameters() if p.requires_grad
    }


def patched_state(model: torch.nn.Module) -> list[Any]:
    """Everything that `memory_saving` replaces."""
    modules = [
        (
            len(m._forward_hooks),
            "forward" in m.__dict__,
            getattr(m, "cast_input_dtype_enabled", None),
        )
        for m in model.modules()
    ]
    return [torch.get_float32_matmul_precision(), *modules]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("half", "near"), [(False, 1e-5), (True, 2e-2)])
def test_memory_saving_steps_match_plain_steps(
    half: bool, near: float, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    for owner, name in ((LinearAddFunction, "apply"), (ChunkedLoss, "_sum")):
        own = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, own=own, n=owner.__name__: used.append(n) or own(*args)
        )
    expected = weight_changes(False, half)
    assert not used
    found = weight_changes(True, half, chunked)
    assert set(used) == {"LinearAddFunction", *(["ChunkedLoss"] if chunked else [])}
    for name, change in expected.items():
        assert float((found[name] - change).norm()) < near * float(change.norm()), name
