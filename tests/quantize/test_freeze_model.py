"""Freezing a model on a grid that is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import VOCABULARY, tiny_model
from qwlora import fingerprint, freeze_, quantize_
from qwlora.errors import EncodingsFileError, GridError
from qwlora.formats.aimet_encodings import EncodingsFile, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import PerBlock, PerChannel, PerTensor, Scheme
from qwlora.nn.packed_layer import packed_weights

IDS = torch.arange(24).reshape(2, 12) % VOCABULARY


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {
        f"{path}.weight": module.weight
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    }


def on_a_grid(
    scheme: Scheme, dtype: torch.dtype = torch.float32
) -> tuple[Any, dict[str, Encoding]]:
    """A tiny model whose weights somebody rounded to a grid, and the grid."""
    model = tiny_model("llama").to(dtype)
    encodings = {}
    for name, weight in weights(model).items():
        encodings[name] = measure(weight.detach().float(), scheme)
        weight.data = encodings[name].fake_quantize(weight.detach().float()).to(dtype)
    return model, encodings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(4, granularity=PerBlock(16)),
        Scheme(8, symmetric=False, granularity=PerChannel()),
        Scheme(3, granularity=PerTensor()),
    ],
    ids=str,
)
def test_weights_on_a_grid_keep_their_values(scheme: Scheme, dtype: torch.dtype) -> None:
    model, encodings = on_a_grid(scheme, dtype)
    before = {name: weight.detach().float().clone() for name, weight in weights(model).items()}
    freeze_(model, encodings)
    packed = packed_weights(model)
    assert packed.keys() == encodings.keys()
    for name, layer in packed.items():
        tolerance = 0 if dtype == torch.float32 else float(torch.finfo(dtype).eps)
        values = layer.tensor.dequantize()
        torch.testing.assert_close(values, before[name], rtol=tolerance, atol=1e-7)


def test_a_weight_off_its_grid_is_named_with_its_distance_and_nothing_changes() -> None:
    model, encodings = on_a_grid(Scheme(4, granularity=PerChannel()))
    name = "model.layers.1.mlp.up_proj.weight"
    weights(model)[name].data[3, 5] += 0.25 * encodings[name].scale[3]
    before = fingerprint(model)
    message = rf"1 weights .*\n  {name}: 1 of 8,192 values .* 0\.25 steps"
    with pytest.raises(GridError, match=message):
        freeze_(model, encodings)
    assert fingerprint(model) == before
    assert not packed_weights(model)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("blocks", [None, 1, 4])
def test_codes_have_the_values_that_their_makers_formula_gives(
    signed: bool, blocks: int | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    model, given, expected = tiny_model("llama"), {}, {}
    for name, weight in weights(model).items():
        rows, columns = weight.shape
        low = -8 if signed else 0
        codes = torch.randint(low, low + 16, (rows, columns), generator=generator)
        shape = (rows,) if blocks is None else (rows, blocks)
        scale = 0.01 + torch.rand(shape, generator=generator) / 100
        offset = torch.zeros(shape) if signed else torch.full(shape, -7.0)
        wide = (x.view(rows, -1) for x in (scale, offset))
        s, o = (x.repeat_interleave(columns // x.shape[1], 1) for x in wide)
        expected[name] = (codes + o) * s
        kind = torch.int8 if signed else torch.uint8
        given[name] = (codes.to(kind), scale) if signed else (codes.to(kind), scale, offset)
    freeze_(model, codes=given, bitwidth=4, signed=signed)
    for name, layer in packed_weights(model).items():
        torch.testing.assert_close(layer.tensor.dequantize(), expected[name], rtol=0, atol=1e-7)
        assert layer.encoding.scheme.symmetric == signed


def test_frozen_codes_are_the_base_that_quantize_makes() -> None:
    """The same integers, whichever way they came: one fingerprint, equal logits."""
    quantized = tiny_model("llama")
    quantize_(quantized, "w4-block16", "rtn")
    frozen = tiny_model("llama")
    codes = {
        name: (layer.tensor.codes, layer.encoding.scale, layer.encoding.offset)
        for name, layer in packed_weights(quantized).items()
    }
    freeze_(frozen, codes=codes, bitwidth=4, signed=False)
    assert fingerprint(frozen) == fingerprint(quantized)
    with torch.no_grad():
        assert torch.equal(frozen(IDS).logits, quantized(IDS).logits)


CODES = torch.zeros(64, 64, dtype=torch.int8)


@pytest.mark.parametrize(
    ("given", "bitwidth", "problem"),
    [
        ((CODES, torch.ones(64)), None, "need their bitwidth"),
        ((CODES,), 4, r"\(codes, scale\)"),
        ((CODES.float(), torch.ones(64)), 4, "float32, not integers"),
        ((CODES + 8, torch.ones(64)), 4, "run from 8 to 8, .* hold -8 to 7"),
        ((CODES, torch.ones(3)), 4, r"scale of shape \[3\] fits no granularity"),
        ((CODES[:32], torch.ones(32)), 4, r"shape \[32, 64\], the weight is \[64, 64\]"),
        ((CODES, torch.zeros(64)), 4, "scale is a finite positive number"),
    ],
)
def test_codes_that_cannot_be_are_explained(
    given: tuple[Tensor, ...], bitwidth: int | None, problem: str
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(GridError, match=problem):
        freeze_(tiny_model("llama"), codes={name: given}, bitwidth=bitwidth)


def test_unknown_names_and_nothing_at_all_are_refused() -> None:
    codes = {"model.layers.0.self_attn.q_prj.weight": (CODES, torch.ones(64))}
    with pytest.raises(GridError, match=r"q_prj\.weight: no weight .*q_proj\.weight"):
        freeze_(tiny_model("llama"), codes=codes, bitwidth=4)
    with pytest.raises(GridError, match="either encodings or codes"):
        freeze_(tiny_model("llama"))
    with pytest.raises(GridError, match="nothing to freeze"):
        freeze_(tiny_model("llama"), {})


def aimet_file(folder: Path, grids: dict[str, Encoding]) -> Path:
    entries = tuple(entry_of(name, grid, "1.0.0") for name, grid in grids.items())
    file = EncodingsFile(
        "1.0.0",
        entries,
        producer={"package": "aimet-torch", "version": "2.42.0"},
        parameters=frozenset(grids),
        excluded_layers=(),
        quantizer_args={},
    )
    write_encodings(file, folder / "model.encodings")
    return folder / "model.encodings"


@pytest.mark.parametrize("scheme", [Scheme(4, granularity=PerBlock(16)), Scheme(8)], ids=str)
def test_an_encodings_file_freezes_like_its_encodings(scheme: Scheme, tmp_path: Path) -> None:
    model, encodings = on_a_grid(scheme)
    from_file = freeze_(model, aimet_file(tmp_path, encodings))
    assert fingerprint(from_file) == fingerprint(freeze_(on_a_grid(scheme)[0], encodings))
    name = "model.layers.1.mlp.up_proj.weight"
    path = aimet_file(tmp_path, {n: grid for n, grid in encodings.items() if n != name})
    with pytest.raises(EncodingsFileError, match=rf"{name}'.*no entry.*keep_float"):
        freeze_(on_a_grid(scheme)[0], path)
    kept = freeze_(on_a_grid(scheme)[0], path, keep_float=["model.layers.1.mlp.up_proj"])
    assert packed_weights(kept).keys() == encodings.keys() - {name}


def test_a_file_of_another_checkpoint_is_refused(tmp_path: Path) -> None:
    model, encodings = on_a_grid(Scheme(4, granularity=PerChannel()))
    wrong = {n: Encoding(e.scheme, e.scale * 0.2, e.offset) for n, e in encodings.items()}
    before = fingerprint(model)
    with pytest.raises(GridError, match="14 weights cannot be frozen"):
        freeze_(model, aimet_file(tmp_path, wrong))
    assert fingerprint(model) == before
