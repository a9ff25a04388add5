"""The chunked loss against each model's own loss and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaModel, T5Config, T5ForConditionalGeneration
from transformers.loss.loss_utils import ForCausalLMLoss

from adapter.small_models import LOGIT_CHANGES, OTHERS, built
from conftest import ARCHITECTURES, VOCABULARY, tiny_model
from qwlora import quantize_
from qwlora.adapter.chunked_loss import ChunkedLoss, sliced_cross_entropy
from qwlora.errors import TrainingError
from qwlora.grid.scheme import parse_scheme
from qwlora.nn import PackedLinear
from qwlora.nn.packed_tensor import PackedTensor
from qwlora.quantize.layer_rules import LayerRule

EIGHT_BIT_HEAD = [LayerRule("lm_head", parse_scheme("w8-block32"))]


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 256, (3, 21), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :9] = labels[2, 15:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model: torch.nn.Module, **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch(), **more).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


@pytest.fixture(autouse=True)
def chunks_of_seven_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwlora.adapter.chunked_loss.CHUNK_LOGITS", 6 * VOCABULARY)


def assert_same(model: torch.nn.Module, **more: Any) -> None:
    loss, gradients = loss_and_gradients(model, **more)
    with ChunkedLoss(model):
        chunked_loss, chunked_gradients = loss_and_gradients(model, **more)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    assert chunked_gradients.keys() == gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        near = {"rtol": 1e-5, "atol": 2e-6 * largest}
        torch.testing.assert_close(chunked_gradients[name], gradient, **near, msg=name)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *LOGIT_CHANGES, *OTHERS])
def test_loss_and_gradients_match_the_models_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built(name)
    assert_same(model)
    assert_same(model, num_items_in_batch=torch.tensor(77))
    shifted = torch.nn.functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    monkeypatch.setattr("qwlora.adapter.chunked_loss.CHUNK_LOGITS", 1000 * VOCABULARY)
    assert_same(model, shift_labels=shifted)  # in a single chunk
    assert model(**batch()).logits.shape == (3, 21, VOCABULARY)  # the own forward is restored


@pytest.mark.parametrize("name", ["qwen3", "soft cap", "packed"])
def test_adapter_on_the_head_gets_gradients(name: str) -> None:
    model = built("qwen3" if name == "packed" else name)
    if name == "packed":
        quantize_(model, "w4-block32", "rtn", rules=EIGHT_BIT_HEAD)
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    peft = get_peft_model(model.requires_grad_(False), config).eval()
    assert_same(peft)
    assert any("lm_head.lora_A" in n for n in loss_and_gradients(peft)[1])


class _Largest(TorchDispatchMode):
    """Size of the largest result that fits the description."""

    def __init__(self, fits: Callable[[Tensor], bool]):
        super().__init__()
        self.fits, self.numbers = fits, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, Tensor) and self.fits(tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def is_logits(tensor: Tensor) -> bool:
    """Not the head's weight, transposed."""
    return tensor.shape[-1:] == (VOCABULARY,) and len(tensor) not in (32, 64)


@pytest.mark.parametrize("name", ["llama", "soft cap"])
def test_logits_of_the_whole_batch_never_exist(name: str) -> None:
    model = built(name).requires_grad_(False)
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    ChunkedLoss(peft)
    with _Largest(is_logits) as largest:
        output = peft(**batch())
        output.loss.backward()
    assert largest.numbers == 7 * VOCABULARY
    assert output.logits is None


def test_without_gradients_and_without_labels() -> None:
    model = tiny_model("llama")
    own = model(**batch()).loss
    ChunkedLoss(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).loss, own, rtol=1e-6, atol=0)
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    assert model(**inputs).logits.shape == (3, 21, VOCABULARY)
    first = {k: v[:1] for k, v in inputs.items()}
    assert model.generate(**first, max_new_tokens=2, do_sample=False).shape == (1, 23)


def alike(found: dict[str, Tensor], expected: dict[str, Tensor], least: float) -> bool:
    """Whether all gradients have nearly the same direction."""
    pairs = [(found[name].flatten(), g.flatten()) for name, g in expected.items()]
    return all(float(torch.cosine_similarity(*pair, dim=0)) > least for pair in pairs)


def sliced(
    hidden: Tensor, targets: Tensor, weight: Tensor, rows: int, bias: Tensor | None = None
) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwlora.adapter.chunked_loss.SLICE_LOGITS", (rows - 1) * len(hidden))
        return sliced_cross_entropy(hidden, targets, weight.__getitem__, len(weight), bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [7, 100, 1000])
def test_sum_over_vocabulary_slices_is_the_cross_entropy(bias: bool, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(100, 16, generator=generator)
    offset = torch.randn(100, generator=generator) if bias else None
    # Logits up to 80: a sum without its maximum would overflow.
    hidden = (torch.randn(30, 16, generator=generator) * 5).requires_grad_()
    targets = torch.randint(0, 100, (30,), generator=generator)
    logits = torch.nn.functional.linear(hidden, weight, offset)
    own = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    (gradient,) = torch.autograd.grad(own * 0.3, hidden)
    found = sliced(hidden, targets, weight, rows, offset)
    torch.testing.assert_close(found, own, rtol=1e-6, atol=0)
    (sliced_gradient,) = torch.autograd.grad(found * 0.3, hidden)
    torch.testing.assert_close(sliced_gradient, gradient, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        found = sliced(hidden, targets, weight, rows, offset)
    torch.testing.assert_close(found, own, rtol=1e-6, atol=0)


def test_bfloat16_gradient_of_a_nearly_certain_token_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).bfloat16()
    targets = torch.randint(0, 512, (32,), generator=generator)
    certainty = torch.linspace(0.1, 0.3, 32).unsqueeze(1)
    hidden = (weight[targets].float() * certainty).bfloat16().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    logits = torch.nn.functional.linear(exact, weight.double())
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert each.min() < 0.01 < 1 < each.max()
    (gradient,) = torch.autograd.grad(each.sum(), exact)
    found = sliced(hidden, targets, weight, 64)
    off = torch.autograd.grad(found, hidden)[0].double() - gradient
    # Logits are rounded, which alone makes 0.05.
    assert (off.norm(dim=1) / gradient.norm(dim=1)).max() < 0.1


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # tied and untied heads
@pytest.mark.parametrize("packs", [False, True])
def test_the_weight_of_the_head_is_never_whole(
    monkeypatch: pytest.MonkeyPatch, name: str, half: bool, packs: bool
) -> None:
    monkeypatch.setattr("qwlora.adapter.chunked_loss.SLICE_LOGITS", 600)
    model = tiny_model(name).requires_grad_(False)
    if packs:
        quantize_(model, "w4-block32", "rtn", rules=EIGHT_BIT_HEAD)
    assert isinstance(model.get_output_embeddings(), PackedLinear) == packs
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft = get_peft_model(model, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        own, gradients = loss_and_gradients(peft)
        ChunkedLoss(peft)
        unpacked, dequantize = [(0,)], PackedTensor.dequantize

        def counted(*given: Any) -> Tensor:
            unpacked.append(dequantize(*given).shape)
            return dequantize(*given)

        monkeypatch.setattr(PackedTensor, "dequantize", counted)
        with _Largest(lambda t: t.dtype == torch.bfloat16) as largest:
            loss, chunked = loss_and_gradients(peft)
    torch.testing.assert_close(loss, own, rtol=1e-3 if half else 1e-6, atol=0)
    assert alike(chunked, gradients, 0.999 if half else 0.99999)
    assert max(shape[0] for shape in unpacked) < VOCABULARY
    assert largest.numbers < VOCABULARY * 64


def smoothed(logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
    return ForCausalLMLoss(logits, labels, vocab_size) - 0.1 * logits.float().log_softmax(-1).mean()


def test_refuses_models_that_compute_something_else() -> None:
    smooth, clamped = tiny_model("llama"), tiny_model("llama")
    smooth.loss_function = smoothed
    own = clamped.forward

    def forward(**arguments: Any) -> Any:
        output = own(**arguments)
        output["logits"] = output.logits.clamp(-60, 60)  # a small batch's logits are far smaller
        return output

    clamped.forward = forward
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, num_heads=2, decoder_start_token_id=0))
    for other, message in (
        (smooth, r"LlamaForCausalLM cannot be .*chunked_loss=False"),
        (clamped, "its configuration does not say how"),
        (LlamaModel(tiny_model("llama").config), "LlamaModel cannot be .* no output head"),
        (torch.nn.Linear(2, 2), "Linear is not a model of transformers"),
        (t5, "T5ForConditionalGeneration cannot be trained"),
    ):
        with pytest.raises(TrainingError, match=message):
            ChunkedLoss(other)


@pytest.mark.parametrize(
    ("label", "place", "message"),
    [
        (VOCABULARY, (1, 3), rf"labels range from .*{VOCABULARY}"),
        (-3, (1, 3), "labels range from -3"),
        (-100, slice(None), "no loss token"),
    ],
)
def test_refuses_labels_that_are_no_tokens(label: int, place: Any, message: str) -> None:
    model, given = tiny_model("llama"), batch()
    ChunkedLoss(model)
    given["labels"][place] = label
    with pytest.raises(TrainingError, match=message):
        model(**given)
