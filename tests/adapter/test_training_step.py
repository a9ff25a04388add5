"""Fused LoRA and `memory_saving` on packed layers: PEFT's numbers; nothing stays replaced afterwards."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

import qwlora
from conftest import packed_model
from qwlora.adapter.chunked_loss import ChunkedLoss
from qwlora.adapter.training_step import fused_lora
from qwlora.nn import PackedLinear
from qwlora.nn.weight_view import LinearAddFunction
from qwlora.system.device import onednn_float32_matmul, onednn_is_exact

IDS = torch.arange(64).view(2, 32)


def adapted_model(architecture: str = "llama", **options: Any) -> PeftModel:
    """A packed model with a nonzero adapter."""
    model = packed_model(architecture)
    model.config.use_cache = False
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    found = get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(1)
    for name, p in found.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.05
    return found


def loss_and_gradients(model: PeftModel, active: bool) -> dict[str, Tensor]:
    """Loss and gradients, with or without the fused forward."""
    model.zero_grad()
    with fused_lora(model) if active else torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(0)  # dropout
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"loss": loss.detach()} | {n: g.clone() for n, g in gradients.items() if g is not None}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights that `LinearAddFunction` multiplies with, going forward."""
    shapes: list[tuple[int, ...]] = []
    own = LinearAddFunction.forward

    def forward(*given: Any) -> Any:
        shapes.append(given[-1].shape)
        return own(*given)

    monkeypatch.setattr(LinearAddFunction, "forward", staticmethod(forward))
    return shapes


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.3}, {"use_rslora": True, "lora_alpha": 5}], ids=str
)
@pytest.mark.parametrize(("architecture", "layers"), [("llama", 14), ("gpt2", 8)])
def test_loss_and_gradients_match_peft(
    architecture: str, layers: int, options: dict[str, Any], added: list[Any]
) -> None:
    model = adapted_model(architecture, **options)
    expected = loss_and_gradients(model, active=False)
    assert not added
    found = loss_and_gradients(model, active=True)
    assert len(added) == layers
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def changed(how: str) -> PeftModel:
    """A model whose layers are not plain LoRA."""
    options = {"DoRA": {"use_dora": True}, "biases": {"lora_bias": True}}.get(how, {})
    model: Any = adapted_model("gpt2" if how == "biases" else "llama", **options)
    if how == "two":
        shape = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model.add_adapter("other", shape)
        model.base_model.set_adapter(["default", "other"])
    if how == "off":
        model.base_model.disable_adapter_layers()
        model.get_input_embeddings().weight.requires_grad_()  # otherwise nothing has a gradient
    for layer in model.modules():
        if how == "hooked" and isinstance(layer, PackedLinear):
            layer.register_forward_hook(lambda module, inputs, output: output * 1.5)
        if how == "replaced" and isinstance(layer, LoraLayer):
            layer.forward = partial(type(layer).forward, layer)
    return model


@pytest.mark.parametrize("how", ["DoRA", "two", "off", "biases", "hooked", "replaced"])
def test_other_layers_keep_pefts_forward(how: str, added: list[Any]) -> None:
    model = changed(how)
    expected, found = (loss_and_gradients(model, active) for active in (False, True))
    assert not added
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(("how", "own"), [("plain", 0), ("replaced", 14)])
def test_forward_is_restored(how: str, own: int) -> None:
    model = changed(how)
    before = [layer.__dict__.get("forward") for layer in model.modules()]
    with fused_lora(model):
        assert sum("forward" in layer.__dict__ for layer in model.modules()) == 14
    after = [layer.__dict__.get("forward") for layer in model.modules()]
    assert after == before
    assert sum(forward is not None for forward in after) == own


def weight_changes(lean: bool, half: bool, chunked: bool = True) -> dict[str, Tensor]:
    """Change of each adapter weight over three steps."""
    model: Any = packed_model("llama")
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)
    before = patched_state(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    saving = qwlora.memory_saving(model, half, chunked_loss=chunked)
    with saving if lean else contextlib.nullcontext():
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
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
    onednn_is_exact.cache_clear()
    yield
    onednn_is_exact.cache_clear()
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("rounded_bits", [0, 13, 16], ids=["float32", "TF32", "bfloat16"])
def test_reduced_precision_is_refused(rounded_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Tensor.__matmul__

    def product(x: Tensor, w: Tensor) -> Tensor:
        if x.dtype == torch.float64 or torch.get_float32_matmul_precision() == "highest":
            return own(x, w)
        rounded = (t.contiguous().view(torch.int32) >> rounded_bits << rounded_bits for t in (x, w))
        return own(*(t.view(torch.float32) for t in rounded))

    monkeypatch.setattr(Tensor, "__matmul__", product)
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
