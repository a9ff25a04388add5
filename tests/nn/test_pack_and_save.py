"""Packed layers, quantizing a model, the base on disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from conftest import byte_tokenizer, tiny_model
from qwlora import PackedLinear, fingerprint, load_base, quantize_, save_base
from qwlora.errors import MergeError
from qwlora.grid.min_max import measure
from qwlora.grid.scheme import parse_scheme

SCHEMES = [
    "w4-block32",
    "w3-block16",
    "w2-block32-asymmetric",
    "w8-channel",
    "w4-tensor",
    "w5-channel-asymmetric",
    "w6-block8",
    "w7-tensor-asymmetric",
]


def packed(scheme: str, bias: bool = True) -> tuple[PackedLinear, torch.Tensor]:
    """A layer of 96 -> 40, and the weight that its codes stand for."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    encoding = measure(linear.weight.detach(), parse_scheme(scheme))
    codes = encoding.quantize(linear.weight.detach())
    return PackedLinear.from_codes(codes, encoding, linear.bias), encoding.dequantize(codes)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_computes_with_exactly_its_integers(scheme: str) -> None:
    layer, weight = packed(scheme)
    x = torch.randn(3, 7, 96)
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, weight, layer.bias), rtol=0, atol=0
    )
    assert torch.equal(torch.Tensor(layer.weight), weight)
    assert torch.equal(layer.encoding.dequantize(layer.codes), weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_is_that_of_the_float_layer_and_no_float_weight_is_saved(scheme: str) -> None:
    layer, weight = packed(scheme)
    x = torch.randn(5, 96, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert saved == []
    (found,) = torch.autograd.grad(out.square().sum(), x)
    (expected,) = torch.autograd.grad(nn.functional.linear(x, weight, layer.bias).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_bias_gets_a_gradient_if_it_wants_one() -> None:
    layer, weight = packed("w4-block32")
    x = torch.randn(2, 3, 96)
    layer(x).square().sum().backward()
    expected = nn.Parameter(layer.bias.detach().clone())
    nn.functional.linear(x, weight, expected).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, expected.grad)


def test_casting_the_model_does_not_move_the_grid() -> None:
    layer, weight = packed("w4-block32")
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.quantized.dequantize(), weight)
    assert layer(torch.randn(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_and_state_dicts_hold_the_same_integers() -> None:
    layer, weight = packed("w4-block32-asymmetric")
    assert set(layer.state_dict()) == {"packed", "scale", "zero_point", "bias"}
    other = copy.deepcopy(layer)
    other.packed.zero_()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(torch.Tensor(other.weight), weight)


def test_sizes_are_dense() -> None:
    for bitwidth in (2, 3, 4, 5, 6, 7, 8):
        layer, _ = packed(f"w{bitwidth}-block32")
        assert layer.packed.numel() == 40 * 96 * bitwidth // 8


def test_attaching_first_and_quantizing_after_gives_the_same_base() -> None:
    first, second = tiny_model("llama"), tiny_model("llama")
    quantize_(first, "w4-block32")
    wrapped = get_peft_model(second, LoraConfig(r=2, target_modules="all-linear"))
    quantize_(wrapped, "w4-block32")
    assert fingerprint(wrapped) == fingerprint(first)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(wrapped.eval()(ids).logits, first(ids).logits)


def test_merging_is_refused_and_changes_nothing() -> None:
    model = tiny_model("llama")
    quantize_(model, "w4-block32")
    before = fingerprint(model)
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    for merge in (wrapped.merge_adapter, lambda: wrapped.merge_adapter(safe_merge=True)):
        with pytest.raises(MergeError, match="Keep the adapter separate"):
            merge()
    assert fingerprint(wrapped) == before


def test_presets_and_integer_block_scales_are_packed_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize_(model, "w3-block64")
    assert {str(m.scheme) for m in model.modules() if isinstance(m, PackedLinear)} == {
        "int3 symmetric per block 64"
    }
    model = tiny_model("llama")
    quantize_(model, "w4-lpbq16", solver="rtn")
    save_base(model, byte_tokenizer(), tmp_path, "somewhere")
    assert {
        str(m.scheme) for m in load_base(tmp_path).modules() if isinstance(m, PackedLinear)
    } == {"int4 symmetric per block 16 with int4 scales"}
