"""One writer: every granularity in every version is written as what it is, or refused."""

from pathlib import Path

import pytest
import torch

from qwlora.errors import ConversionError, EncodingsFileError
from qwlora.formats.aimet_encodings import (
    VERSIONS,
    EncodingsFile,
    read_encodings,
    write_encodings,
)
from qwlora.formats.aimet_encodings.grids import TensorLayout, encoding_of, entry_of, grid_of
from qwlora.grid.encoding import Encoding, measure
from qwlora.grid.scheme import (
    Granularity,
    Lpbq,
    PerBlock,
    PerChannel,
    PerTensor,
    Scheme,
    SignedBlock,
)

OUT, IN, BLOCK = 6, 16, 4
GRANULARITIES: list[Granularity] = [PerTensor(), PerChannel(0), PerChannel(1), PerBlock(BLOCK)]
SCHEMES = [
    Scheme(bits, symmetric, granularity)
    for bits in (2, 4, 8, 16)
    for symmetric in (True, False)
    for granularity in GRANULARITIES
] + [Scheme(bits, True, Lpbq(BLOCK)) for bits in (2, 4, 8)]


def grid(scheme: Scheme) -> Encoding:
    """Random scales and offsets for a weight [OUT, IN]."""
    generator = torch.Generator().manual_seed(scheme.bitwidth)
    shape = scheme.scale_shape((OUT, IN))
    scale = torch.rand(shape, generator=generator) + 0.1
    if isinstance(scheme.granularity, Lpbq):
        scale = scheme.granularity.nearest(scale)
    offset = torch.full(shape, scheme.symmetric_offset, dtype=torch.int32)
    if not scheme.symmetric:
        offset = -torch.randint(1, scheme.steps, shape, generator=generator, dtype=torch.int32)
    return Encoding(scheme, scale, offset)


def written(encoding: Encoding, version: str, path: Path, transposed: bool) -> EncodingsFile:
    entry = entry_of("w", encoding, version, transposed)
    parameters = frozenset({"w"}) if version < "2" else None
    write_encodings(EncodingsFile(version, (entry,), parameters), path)
    return read_encodings(path)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_grid_comes_back_from_every_version_that_can_hold_it(
    scheme: Scheme, version: str, transposed: bool, tmp_path: Path
) -> None:
    encoding = grid(scheme)
    if version == "0.6.1" and isinstance(scheme.granularity, PerBlock | Lpbq):
        with pytest.raises(ConversionError, match="w"):
            written(encoding, version, tmp_path / "x", transposed)
        return
    (entry,) = written(encoding, version, tmp_path / "x", transposed).encodings
    axis = scheme.granularity.axis if isinstance(scheme.granularity, PerChannel) else 0
    placement = TensorLayout((OUT, IN), transposed, axis, "tensor" if transposed else "channel")
    again = grid_of(entry, placement, version)
    assert torch.equal(again.scale, encoding.scale)
    assert torch.equal(again.offset, encoding.offset)
    assert again.scheme.granularity == scheme.granularity
    assert again.scheme.bitwidth == scheme.bitwidth
    if version == "2.1.0" and not transposed:  # which says it all by itself
        assert encoding_of(entry).equals(encoding)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_signed_blocks_come_back_as_asymmetric_ones_of_equal_values(
    bits: int, version: str, transposed: bool, tmp_path: Path
) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(bits))
    signed = measure(weight, Scheme(bits, granularity=SignedBlock(BLOCK)))
    assert 0 < int((signed.scale < 0).sum()) < signed.scale.numel()
    (entry,) = written(signed, version, tmp_path / "x", transposed).encodings
    placement = TensorLayout((OUT, IN), transposed, 0, "tensor" if transposed else "channel")
    again = grid_of(entry, placement, version)
    assert again.scheme == Scheme(bits, False, PerBlock(BLOCK))
    values = signed.fake_quantize(weight)
    assert torch.equal(again.fake_quantize(values), values)
    for code in range(2**bits):  # every code of a signed block, and none beside them
        codes = torch.full((OUT, IN), code, dtype=torch.uint8)
        steps = torch.where(signed.scale < 0, 2**bits - 1 - code, code).to(torch.uint8)
        turned = steps.repeat_interleave(BLOCK, 1)
        assert torch.equal(again.dequantize(turned), signed.dequantize(codes))


@pytest.mark.parametrize("version", VERSIONS)
def test_float_offsets_are_refused(version: str) -> None:
    scheme = Scheme(4, False, PerBlock(BLOCK), float_offset=True)
    with pytest.raises(EncodingsFileError, match=r"(?s)w.*float offsets"):
        entry_of("w", measure(torch.randn(OUT, IN), scheme), version)
