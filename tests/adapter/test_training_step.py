"""`memory_saving` in a user's own loop: PEFT's results; nothing stays replaced afterwards."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import qwlora
from conftest import packed_model
from qwlora.adapter.chunked_loss import ChunkedLoss
from qwlora.nn.weight_view import LinearAddFunction
from qwlora.system.device import onednn_float32_matmul


def weight_changes(lean: bool, half: bool, chunked: bool = True) -> dict[str, Tensor]:
    """Change of each adapter weight over three steps."""
    model: Any = packed_model("llama")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    ids, before = torch.arange(64).view(2, 32), patched_state(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    saving = qwlora.memory_saving(model, half, chunked_loss=chunked)
    with saving if lean else contextlib.nullcontext():
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert patched_state(model) == before
    return {n: p.detach() - start[n] for n, p in model.named_parameters() if p.requires_grad}


def patched_state(model: torch.nn.Module) -> list[Any]:
    """Everything that `memory_saving` replaces."""
    modules = [
        (len(m._forward_hooks), "forward" in vars(m), vars(m).get("cast_input_dtype_enabled"))
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


@pytest.fixture
def precision() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("rounded_bits", [0, 13, 16], ids=["float32", "TF32", "bfloat16"])
def test_reduced_precision_is_refused(rounded_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = torch.Tensor.__matmul__

    def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest":
            return own(x, w)
        rounded = (t.contiguous().view(torch.int32) >> rounded_bits << rounded_bits for t in (x, w))
        return own(*(t.view(torch.float32) for t in rounded))

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    with onednn_float32_matmul():
        assert (torch.get_float32_matmul_precision() == "medium") is (rounded_bits == 0)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("device", "chosen"), [("cpu", "high"), ("cuda", "highest")])
def test_precision_and_rng_are_as_before(device: str, chosen: str) -> None:
    state = torch.get_rng_state()
    x, w = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(1))
    exact = x.double() @ w.double()
    with onednn_float32_matmul():
        assert (x @ w - exact).abs().max() < 1e-5 * exact.abs().max()
    with pytest.raises(KeyError), onednn_float32_matmul():
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(torch.get_rng_state(), state)
    torch.set_float32_matmul_precision(chosen)
    with onednn_float32_matmul(device):
        assert torch.get_float32_matmul_precision() == chosen
    assert torch.get_float32_matmul_precision() == chosen
