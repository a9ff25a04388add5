"""Comparing files: in one version, across versions, within a tolerance."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_files import FILES, files

from qwlora.formats.aimet_encodings import (
    VERSIONS,
    Difference,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    diff,
    read_encodings,
)


def one(encoding: Entry, version: str = "2.0.0", parameter: bool | None = None) -> EncodingsFile:
    names = frozenset({encoding.name} if parameter else ())
    return EncodingsFile(version, (encoding,), None if parameter is None else names)


A = IntegerEncoding("w", 8, [1.0, 2.0], [-128, -128], True, True, axis=0)
FLOAT = FloatEncoding("w", 8, "float8e5m2", A.scale, 0)


@pytest.mark.parametrize("version", VERSIONS)
@given(st.data())
def test_a_file_equals_itself(version: str, data: st.DataObject) -> None:
    file, _ = data.draw(files(version))
    assert diff(file, file) == []


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (A.replace(scale=[1.0, 2.5]), Difference("w", "scale", "2.0 at 1", "2.5", 0.2)),
        (A.replace(scale=[2.0, 4.0]), Difference("w", "scale", "1.0 at 0, and 1 more", "2.0", 0.5)),
        (A.replace(offset=[-128, -127]), Difference("w", "offset", "-128 at 1", "-127")),
        (A.replace(bitwidth=4), Difference("w", "bitwidth", "8", "4")),
        (A.replace(symmetric=False), Difference("w", "symmetric", "True", "False")),
        (A.replace(signed=False), Difference("w", "signed", "True", "False")),
        (A.replace(axis=1), Difference("w", "axis", "0", "1")),
        (A.replace(zero_point_shift=0.5), Difference("w", "zero_point_shift", "0.0", "0.5")),
        (A.replace(block_size=2), Difference("w", "granularity", "channel", "block")),
        (FLOAT, Difference("w", "kind", "Integer", "Float")),
    ],
)
def test_each_field_is_compared(other: Entry, difference: Difference) -> None:
    (found,) = diff(one(A), one(other))
    assert found.relative == pytest.approx(difference.relative)
    assert replace(found, relative=difference.relative) == difference


def test_the_tolerance_is_relative_and_only_for_scales() -> None:
    other = one(A.replace(scale=[1.01, 2.0]))
    assert diff(one(A), other, 0.01) == []
    assert [d.field for d in diff(one(A), other, 0.0099)] == ["scale"]
    assert [d.field for d in diff(one(A), one(A.replace(offset=[-127, -128])), 1.0)] == ["offset"]
    for wrong in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"tolerance {wrong}"):
            diff(one(A), other, wrong)


def test_names_in_only_one_file_are_differences() -> None:
    found = diff(one(A), one(A.replace(name="v")))
    assert [str(d) for d in found] == ["w: only in the first", "v: only in the second"]


def test_fields_that_a_version_lacks_are_not_differences() -> None:
    flat = A.replace(signed=None, axis=None)
    assert diff(one(flat, "1.0.0", True), one(A)) == []
    nested = one(LpbqEncoding("w", 4, 2, [[1, 2]], [[0.5]], None, 1))
    flat_lpbq = LpbqEncoding("w", 4, 2, [1, 2], [0.5], 8)
    assert diff(one(flat_lpbq, "1.0.0", True), nested) == []
    other = one(flat_lpbq.replace(block_scale=[1, 3]), "1.0.0", True)
    assert [d.field for d in diff(other, nested)] == ["block_scale"]
    shorter = one(A.replace(scale=[1.0], offset=[-128]))
    assert [d.field for d in diff(one(A), shorter)] == ["scale", "offset"]


def test_sections_and_file_fields_are_compared() -> None:
    found = diff(one(A, "1.0.0", True), one(A, "1.0.0", False))
    assert [str(d) for d in found] == ["w, section: a parameter | an activation"]
    first, second = (
        EncodingsFile("1.0.0", (), frozenset(), layers, {"bits": bits})
        for layers, bits in (((), 8), (("norm",), 4))
    )
    assert [d.field for d in diff(first, second)] == ["excluded_layers", "quantizer_args"]


def test_aimets_files_differ_where_its_simulations_do() -> None:
    versions = (FILES / f"aimet-{version}.encodings" for version in ("1.0.0", "2.0.0"))
    found = [str(difference) for difference in diff(*map(read_encodings, versions))]
    scales = "6.240290531422943e-05 | 6.211872096173465e-05 (relative difference 0.00455)"
    assert found[0] == f"y, scale: {scales}"
    assert [line.partition(" |")[0].rpartition(" ")[0] for line in found[1:3]] == [
        "y, offset:",
        "float8.weight_0, kind:",
    ]
    assert found[3:] == ["channel.bias: only in the second"]
