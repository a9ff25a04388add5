"""Conversion between all pairs of versions, and grids through each of them.

`is_held` states what a version can express, independently of the code under test.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_files import FILES, files

from qwlora.errors import ConversionError, EncodingsFileError
from qwlora.formats.aimet_encodings import (
    VERSIONS,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    convert,
    read_encodings,
    write_encodings,
)
from qwlora.formats.aimet_encodings.encodings_file import parse, to_document
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

FAMILIES = (VERSIONS[:2], VERSIONS[2:])
PAIRS = [(a, b) for family in FAMILIES for a in family for b in family]


def is_held(e: Entry, target: str) -> bool:
    """Whether `target` can express an encoding of the other version with the same layout."""
    if target != "0.6.1" or isinstance(e, FloatEncoding):
        return True
    return isinstance(e, IntegerEncoding) and e.block_size is None and e.scale.shape != (1,)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@settings(max_examples=25)  # for each of 8 pairs
@given(st.data())
def test_what_does_not_come_back_is_listed(source: str, target: str, data: st.DataObject) -> None:
    def through_json(file: EncodingsFile) -> EncodingsFile:
        again, problems = parse(to_document(file))
        assert again is not None, problems
        return again

    file = data.draw(files(source))
    lost = {e.name for e in file.encodings if not is_held(e, target)}
    if not lost:
        there = through_json(convert(file, target))
        assert there.version == target
        assert through_json(convert(there, source)) == through_json(file)
        return
    with pytest.raises(ConversionError) as caught:
        convert(file, target)
    assert caught.value.lost
    kept = through_json(convert(file, target, lossy=True))
    assert convert(kept, target) == kept
    assert {e.name for e in file.encodings} - lost <= kept.by_name.keys()


@pytest.mark.parametrize("source", VERSIONS)
@given(st.data())
def test_axes_and_sections_are_never_invented(source: str, data: st.DataObject) -> None:
    file = data.draw(files(source))
    (others,) = (family for family in FAMILIES if source not in family)
    lacking = "the axes of scales" if source < "2" else "which encodings are parameters"
    for target in others:
        with pytest.raises(ConversionError, match=f"{lacking}.*in version {target}") as caught:
            convert(file, target, lossy=True)
        assert caught.value.lost == ()


BLOCK = IntegerEncoding("w", 4, [0.1, 0.2, 0.3, 0.4], [-8] * 4, True, block_size=3)
LPBQ = LpbqEncoding("w", 4, 3, [1, 2, 3, 4], [0.1, 0.2], 8)
NESTED = IntegerEncoding("w", 8, [0.1, 0.2], [-128, -128], True, True, axis=0)
TWO_AXES = LpbqEncoding("w", 4, 2, [[1, 2, 3, 4]] * 2, [[0.1, 0.2], [0.3, 0.4]], axis=1)
WHOLE = "w: the whole encoding,"


@pytest.mark.parametrize(
    ("version", "encoding", "target", "lost"),
    [
        ("1.0.0", BLOCK, "0.6.1", "w: granularity block"),
        ("1.0.0", LPBQ, "0.6.1", f"{WHOLE} LPBQ of 4 bits"),
        ("1.0.0", IntegerEncoding("w", 8, [0.1], [-128], True), "0.6.1", "w: granularity channel"),
        ("2.0.0", TWO_AXES, "2.1.0", f"{WHOLE} LPBQ of 4 bits"),
        # what its own version cannot store is not written
        ("1.0.0", NESTED, None, "w: signed True"),
        ("1.0.0", LPBQ.replace(decompressed_bitwidth=None), None, f"{WHOLE} LPBQ of 4 bits"),
        ("1.0.0", FloatEncoding("w", 8, "float8e5m2", 1.0), None, f"{WHOLE} floats of 8 bits"),
        ("0.6.1", BLOCK, None, "w: granularity block"),
        ("2.0.0", FloatEncoding("w", 16), None, f"{WHOLE} floats of 16 bits"),
        ("2.0.0", NESTED.replace(axis=None), None, f"{WHOLE} integers of 8 bits"),
        ("2.0.0", NESTED.replace(offset=[-128, -127]), None, "w: symmetric True"),
        ("2.1.0", LPBQ, None, f"{WHOLE} LPBQ of 4 bits"),
    ],
)
def test_only_what_is_lost_is_named(version, encoding, target, lost, tmp_path) -> None:
    file = EncodingsFile(version, (encoding,), frozenset({"w"}) if version < "2" else None)
    with pytest.raises(ConversionError) as caught:
        convert(file, target) if target else write_encodings(file, tmp_path / "w")
    assert caught.value.lost[0].startswith(lost)
    assert len(caught.value.lost) == (2 if lost == "w: signed True" else 1)  # its axis too
    assert list(tmp_path.iterdir()) == []


def test_equal_problems_of_encodings_share_a_line() -> None:
    some = tuple(BLOCK.replace(name=f"w{i}") for i in range(4))
    with pytest.raises(ConversionError) as caught:
        convert(EncodingsFile("1.0.0", some, frozenset()), "0.6.1")
    assert caught.value.lost == ("w0, w1, w2 and 1 more: granularity block",)


def test_aimets_2_0_0_and_2_1_0_are_the_same_file() -> None:
    old, new = (read_encodings(FILES / f"aimet-{v}.encodings") for v in ("2.0.0", "2.1.0"))
    assert convert(old, "2.1.0") == new
    assert convert(new, "2.0.0") == old


# Grids: every granularity in every version is written as what it is, or refused

OUT, IN, SIZE = 6, 16, 4
GRANULARITIES: list[Granularity] = [PerTensor(), PerChannel(0), PerChannel(1), PerBlock(SIZE)]
SCHEMES = [
    Scheme(bits, symmetric, granularity)
    for bits in (2, 4, 8, 16)
    for symmetric in (True, False)
    for granularity in GRANULARITIES
] + [Scheme(bits, True, Lpbq(SIZE)) for bits in (2, 4, 8)]
FLOAT_OFFSETS = Scheme(4, False, PerBlock(SIZE), float_offset=True)


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
    scheme, version, transposed, tmp_path
) -> None:
    encoding = grid(scheme)
    with pytest.raises(EncodingsFileError, match=r"(?s)w.*float offsets"):
        entry_of("w", measure(torch.randn(OUT, IN), FLOAT_OFFSETS), version)
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
    bits, version, transposed, tmp_path
) -> None:
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(bits))
    signed = measure(weight, Scheme(bits, granularity=SignedBlock(SIZE)))
    assert 0 < int((signed.scale < 0).sum()) < signed.scale.numel()
    (entry,) = written(signed, version, tmp_path / "x", transposed).encodings
    placement = TensorLayout((OUT, IN), transposed, 0, "tensor" if transposed else "channel")
    again = grid_of(entry, placement, version)
    assert again.scheme == Scheme(bits, False, PerBlock(SIZE))
    values = signed.fake_quantize(weight)
    assert torch.equal(again.fake_quantize(values), values)
    for code in range(2**bits):  # every code of a signed block, and none beside them
        codes = torch.full((OUT, IN), code, dtype=torch.uint8)
        steps = torch.where(signed.scale < 0, 2**bits - 1 - code, code).to(torch.uint8)
        turned = steps.repeat_interleave(SIZE, 1)
        assert torch.equal(again.dequantize(turned), signed.dequantize(codes))
