"""Freezing a model on a grid that is given."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import packed_model, tiny_model
from formats.models import logits
from qwlora import fingerprint, freeze_
from qwlora.errors import EncodingsFileError, GridError, QwloraWarning
from qwlora.formats.aimet_encodings import EncodingsFile, write_encodings
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.grid.encoding import Encoding, QuantizedTensor, measure
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, Scheme, SignedBlock
from qwlora.nn.packed_layer import packed_weights


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


SCHEMES = [
    *(Scheme(4, granularity=blocks(16)) for blocks in (PerBlock, SignedBlock)),
    Scheme(8, False, PerChannel()),
    Scheme(3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
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


@pytest.mark.parametrize("granularity", [PerChannel(), SignedBlock(64)], ids=str)
def test_a_weight_off_its_grid_is_named_with_its_distance_and_nothing_changes(
    granularity: Granularity,
) -> None:
    model, encodings = on_a_grid(Scheme(4, granularity=granularity))
    name = "model.layers.1.mlp.up_proj.weight"
    row = int(encodings[name].scale.argmin())  # of a signed grid, a negative scale
    weights(model)[name].data[row, 5] += 0.25 * encodings[name].scale.flatten()[row]
    before = fingerprint(model)
    message = rf"1 weights .*\n  {name}: 1 of 8,192 values .* 0\.25 steps"
    with pytest.raises(GridError, match=message):
        freeze_(model, encodings)
    assert fingerprint(model) == before
    assert not packed_weights(model)


def test_frozen_integers_are_the_base_that_quantize_makes() -> None:
    """The same integers, whichever way they came."""
    quantized, frozen = packed_model("llama"), tiny_model("llama")
    freeze_(frozen, {name: layer.quantized for name, layer in packed_weights(quantized).items()})
    assert fingerprint(frozen) == fingerprint(quantized)
    assert torch.equal(logits(frozen), logits(quantized))


def integers(rows: int, code: int) -> QuantizedTensor:
    encoding = measure(torch.ones(rows, 64), Scheme(4, granularity=PerChannel()))
    return QuantizedTensor(torch.full((rows, 64), code, dtype=torch.uint8), encoding)


@pytest.mark.parametrize(
    ("name", "rows", "code", "message"),
    [
        ("q_proj", 32, 0, r"shape \[32, 64\], the weight is \[64, 64\]"),
        ("q_proj", 64, 16, "code 16 does not fit in 4 bits"),
        ("q_prj", 64, 0, r"q_prj\.weight: no weight .*q_proj\.weight"),
    ],
)
def test_impossible_integers_are_named(name: str, rows: int, code: int, message: str) -> None:
    model, layer = tiny_model("llama"), "model.layers.0.self_attn.{}.weight"
    given = {layer.format("o_proj"): integers(64, 0), layer.format(name): integers(rows, code)}
    with pytest.raises(GridError, match=message):
        freeze_(model, given)
    with pytest.raises(GridError, match="nothing to freeze"):
        freeze_(model, {})
    assert not packed_weights(model)


def aimet_file(folder: Path, grids: dict[str, Encoding], package: str = "aimet-torch") -> Path:
    entries = tuple(entry_of(name, grid, "1.0.0") for name, grid in grids.items())
    producer = {"package": package, "version": "2.42.0"}
    file = EncodingsFile("1.0.0", entries, frozenset(grids), (), {}, producer)
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


def test_what_a_file_does_not_say_is_given(tmp_path: Path) -> None:
    """The order of blocks; the prefix of a wrapper. The entry of a parameter that nobody packs changes nothing."""
    model, encodings = on_a_grid(Scheme(4, granularity=PerBlock(16)))
    wrapped = {f"m.{name}": encoding for name, encoding in encodings.items()}
    table = torch.randn(4, 16)
    wrapped["m.table"] = measure(table, Scheme(4, granularity=PerBlock(16)))
    path = aimet_file(tmp_path, wrapped, package="another")
    model.register_parameter("table", nn.Parameter(table.clone()))
    with pytest.raises(EncodingsFileError, match=r"no parameter has .* the prefix 'net"):
        freeze_(model, path, prefix="net")
    with pytest.raises(EncodingsFileError, match=r"block_order='channel' or 'tensor' in Python"):
        freeze_(model, path)
    with pytest.warns(QwloraWarning, match=r"1 entries .* without a packed layer .*: table$"):
        freeze_(model, path, block_order="channel")
    assert torch.equal(model.get_parameter("table"), table)
    packed = packed_weights(model)
    assert packed.keys() == encodings.keys()
    assert all(packed[name].encoding.equals(grid) for name, grid in encodings.items())
