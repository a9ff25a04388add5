"""AIMET's low-power blocks, and what another kind of blocks costs: a class."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from conftest import byte_tokenizer, tiny_model
from qwlora import fingerprint, load_base, quantize_, save_base
from qwlora.errors import GridError
from qwlora.formats.aimet_encodings.grids import entry_of
from qwlora.grid.encoding import measure
from qwlora.grid.scheme import Blocks, Lpbq, PerBlock, Scheme, parse_scheme, short_name
from qwlora.nn import packed_weights
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS

from .strategies import brief, matrices


@brief
@given(matrices(columns=8), st.integers(1, 8), st.sampled_from([2, 3, 4, 8]))
def test_scales_are_integers_times_the_rows_scale(x, scale_bitwidth, bitwidth):
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
def test_scales_are_the_nearest_such_products(x):
    plain, low_power = (measure(x, Scheme(4, granularity=k(2))).scale for k in (PerBlock, Lpbq))
    row = plain.amax(-1, keepdim=True) / 16
    assert torch.equal(low_power.amax(-1), plain.amax(-1))
    assert ((low_power - plain).abs() <= torch.where(plain < row / 2, row, row / 2) * 1.00001).all()


def test_by_hand():
    scale = Lpbq(2).nearest(torch.tensor([[16.0, 8.4, 0.1], [0.5, 1.0, 2.0]]))
    assert scale.tolist() == [[16, 8, 1], [0.5, 1, 2]]
    row, integers = Lpbq(2).split(scale)
    assert row.tolist() == [[1], [0.125]]
    assert integers.tolist() == [[16, 8, 1], [4, 8, 16]]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Lpbq(2).split(torch.tensor([[1.0, 0.3]])), "1 of 2 block scales"),
        (lambda: Scheme(4, False, Lpbq(32)), "remove -asymmetric"),
        (lambda: Lpbq(32, 0), "1 to 8 bits, not 0"),
        (lambda: Lpbq(32, 9), "1 to 8 bits, not 9"),
        (lambda: Lpbq(0), "at least one value, not 0"),
    ],
)
def test_other_scales_and_impossible_schemes_are_refused(act, message):
    with pytest.raises(GridError, match=message):
        act()


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
