"""Weights that already lie on a grid, before `quantize_` puts them on one."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from conftest import tiny_model
from qwlora.errors import QwloraWarning
from qwlora.quantize.quantize_model import quantize_
from qwlora.quantize.quantize_tensor import is_on_grid

SHAPE = (24, 192)


def random_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).mul(0.02).to(dtype)


def rounded(weight: Tensor, bitwidth: int, block: int, symmetric: bool = True) -> Tensor:
    """On the grid of `amax / (2^(b - 1) - 1)`, as many tools have it, or on one from min to max."""
    w = weight.float().reshape(-1, block)
    low = 0.0 if symmetric else w.amin(1, keepdim=True)
    steps = 2 ** (bitwidth - 1) - 1 if symmetric else 2**bitwidth - 1
    scale = (w - low).abs().amax(1, keepdim=True) / steps
    return (((w - low) / scale).round() * scale + low).view_as(weight).to(weight.dtype)


@pytest.mark.parametrize("block", [32, 192, 24 * 192])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_of_any_granularity_is_found(block: int, symmetric: bool) -> None:
    for bitwidth in (2, 4, 8):
        assert is_on_grid(rounded(random_weight(), bitwidth, block, symmetric), bitwidth)
    assert not is_on_grid(rounded(random_weight(), 8, block, symmetric), 4)
    for dtype in (torch.bfloat16, torch.float16):
        assert is_on_grid(rounded(random_weight(dtype), 4, 32), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bitwidth", [2, 4, 8])
def test_other_weights_are_on_no_grid(dtype: torch.dtype, bitwidth: int) -> None:
    weight = random_weight(dtype)
    assert not is_on_grid(weight, bitwidth)
    assert not is_on_grid(weight * (torch.arange(192) % 16 == 0), bitwidth)  # two in a run of 32
    assert not is_on_grid(torch.zeros(SHAPE, dtype=dtype), bitwidth)
    assert not is_on_grid(torch.ones(SHAPE, dtype=dtype), bitwidth)


@pytest.mark.parametrize("solver", ["rtn", "search", "gptq"])
def test_a_second_rounding_warns_with_the_layer_and_the_remedy(solver: str) -> None:
    model = tiny_model("qwen3")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data = rounded(layer.weight.data, 4, 32)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.warns(QwloraWarning, match=rf"{name} by \d+\.\d%.*load_precomputed"):
        report = quantize_(model, "w4-block32", solver, calibration=torch.arange(64).view(4, 16))
    assert 0.01 < (report.layers[name].second_rounding or 0) < 0.2
    assert sum(layer.second_rounding is not None for layer in report.layers.values()) == 1


def test_weights_that_stay_where_they_are_do_not_warn() -> None:
    layer = nn.Linear(64, 16)
    scale = torch.rand(16, 2, 1) / 100 + 0.01
    codes = torch.randint(-8, 8, (16, 2, 32))
    codes[..., 0] = -8  # the end of the grid, from which round-to-nearest takes its scale
    codes[..., 1] = 7
    layer.weight.data = (codes * scale).view(16, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = quantize_(nn.Sequential(layer), "w4-block32", "search")
    assert report.layers["0.weight"].second_rounding is None
