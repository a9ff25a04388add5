"""Kinds of blocks: signed ones, AIMET's low-power ones, and what another kind costs: a class."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import byte_tokenizer, tiny_model
from qwlora import fingerprint, load_base, quantize_, save_base
from qwlora.errors import GridError
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import Blocks, Lpbq, PerBlock, Scheme, SignedBlock, parse_scheme, short_name
from qwlora.nn import packed_weights
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS

from .strategies import brief, matrices


@brief
@given(matrices(columns=8), st.integers(1, 8), st.sampled_from([2, 3, 4, 8]))
def test_low_power_scales_are_integers_times_the_rows_scale(x, scale_bitwidth, bitwidth):
    granularity = Lpbq(2, scale_bitwidth)
    scale = measure(x, Scheme(bitwidth, granularity=granularity)).scale
    row, integers = granularity.split(scale)
    assert row.shape == (x.shape[0], 1)
    assert integers.shape == (x.shape[0], 4)
    assert integers.min() >= 1
    assert (integers.max(-1).values == 2**scale_bitwidth).all()
    assert torch.equal(integers * row, scale)
    assert torch.equal(granularity.nearest(scale), scale)


@brief
@given(matrices(columns=8))
def test_low_power_scales_are_the_nearest_such_products(x):
    plain, low_power = (measure(x, Scheme(4, granularity=k(2))).scale for k in (PerBlock, Lpbq))
    row = plain.amax(-1, keepdim=True) / 16
    assert torch.equal(low_power.amax(-1), plain.amax(-1))
    assert ((low_power - plain).abs() <= torch.where(plain < row / 2, row, row / 2) * 1.00001).all()


def weights() -> Tensor:
    return torch.randn(16, 128, generator=torch.Generator().manual_seed(0))


def test_signed_blocks_lean_to_the_side_of_their_largest_value():
    x = torch.tensor([[8.0, -7.0, 1.0, 0.0], [7.0, -8.0, 1.0, 0.0]])
    encoding = measure(x, Scheme(4, granularity=SignedBlock(4)))
    assert encoding.scale.tolist() == [[-1], [1]]
    assert encoding.quantize(x).tolist() == [[0, 15, 7, 8], [15, 0, 9, 8]]
    assert torch.equal(encoding.fake_quantize(x), x)
    # blocks that lean down have the scale of the plain grid
    blocks = weights().unflatten(1, (-1, 32))
    leans_down = -blocks.amin(-1) >= blocks.amax(-1)
    signed, plain = (
        measure(weights(), Scheme(4, granularity=kind(32))).scale
        for kind in (SignedBlock, PerBlock)
    )
    assert torch.equal(signed[leans_down], plain[leans_down])
    assert (signed[~leans_down] < 0).all()


def test_codes_of_signed_blocks_are_those_of_ggufs_q4_0():
    x = weights()
    stored = quantize(x.numpy(), Type.Q4_0)
    blocks = torch.from_numpy(stored.reshape(16, 4, 18).copy())
    scale = torch.from_numpy(blocks[..., :2].numpy().copy().view(np.float16)).float().squeeze(-1)
    scheme = Scheme(4, granularity=SignedBlock(32))
    encoding = Encoding(scheme, scale, torch.full((16, 4), -8, dtype=torch.int32))
    assert 20 < (scale < 0).sum() < 44
    codes = torch.cat([blocks[..., 2:] & 15, blocks[..., 2:] >> 4], -1).flatten(1)
    assert torch.equal(encoding.quantize(x), codes)
    assert torch.equal(encoding.dequantize(codes), torch.from_numpy(dequantize(stored, Type.Q4_0)))


def test_another_kind_of_blocks_is_a_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's scales are powers of two. It is quantized, stored and read back; GGUF, which holds
    any block scales, takes it; AIMET's files, which would have to name it, refuse it.
    """
    monkeypatch.setattr(Blocks, "KINDS", dict(Blocks.KINDS))

    @dataclass(frozen=True)
    class PowersOfTwo(Blocks, kind="power"):
        def nearest(self, scale: Tensor) -> Tensor:
            return scale.log2().round().exp2()

    scheme = parse_scheme("w4-power32")
    assert scheme == Scheme(4, granularity=PowersOfTwo(32))
    assert short_name(scheme) == "w4-power32"
    assert str(scheme) == "int4 symmetric per power 32"
    model = tiny_model("llama")
    quantize_(model, scheme, "search")
    for layer in packed_weights(model).values():
        assert torch.equal(layer.encoding.scale.frexp().mantissa.unique(), torch.tensor([0.5]))
    save_base(model, tmp_path, byte_tokenizer(), source="here")
    loaded = load_base(tmp_path)
    assert fingerprint(loaded) == fingerprint(model)
    assert {layer.scheme for layer in packed_weights(loaded).values()} == {scheme}
    assert not refusals(TARGETS["gguf"], Subject(weights={"all": Weight(scheme)}))
    with pytest.raises(GridError, match="no blocks of kind power"):
        entry_of("w", layer.encoding, "2.1.0")
