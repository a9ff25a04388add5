"""Conversion between all pairs of versions.

`is_held` states what a version can express, independently of the code under test.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_files import FILES, files

from qwlora.errors import ConversionError
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

FAMILIES = (VERSIONS[:2], VERSIONS[2:])
PAIRS = [(a, b) for family in FAMILIES for a in family for b in family]


def through_json(file: EncodingsFile) -> EncodingsFile:
    again, problems = parse(to_document(file))
    assert again is not None, problems
    return again


def is_held(e: Entry, target: str) -> bool:
    """Whether `target` can express an encoding of the other version with the same layout."""
    if target != "0.6.1" or isinstance(e, FloatEncoding):
        return True
    return isinstance(e, IntegerEncoding) and e.block_size is None and e.scale.shape != (1,)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@settings(max_examples=25)  # for each of 8 pairs
@given(st.data())
def test_what_does_not_come_back_is_listed(source: str, target: str, data: st.DataObject) -> None:
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


def one(version: str, encoding: Entry) -> EncodingsFile:
    return EncodingsFile(version, (encoding,), frozenset({"w"}) if version < "2" else None)


@pytest.mark.parametrize(
    ("source", "encoding", "target", "lost"),
    [
        ("1.0.0", BLOCK, "0.6.1", "w: granularity block"),
        ("1.0.0", LPBQ, "0.6.1", f"{WHOLE} LPBQ of 4 bits"),
        ("1.0.0", IntegerEncoding("w", 8, [0.1], [-128], True), "0.6.1", "w: granularity channel"),
        ("2.0.0", TWO_AXES, "2.1.0", f"{WHOLE} LPBQ of 4 bits"),
    ],
)
def test_only_what_is_lost_is_named(source: str, encoding: Entry, target: str, lost: str) -> None:
    with pytest.raises(ConversionError, match="--lossy") as caught:
        convert(one(source, encoding), target)
    assert list(caught.value.lost) == [lost]


@pytest.mark.parametrize(
    ("version", "encoding", "lost"),
    [
        ("1.0.0", NESTED, ["w: signed True", "w: axis 0"]),
        ("1.0.0", LPBQ.replace(decompressed_bitwidth=None), [f"{WHOLE} LPBQ of 4 bits"]),
        (
            "1.0.0",
            FloatEncoding("w", 8, "float8e5m2", 1.0),
            [f"{WHOLE} floats of 8 bits (float8e5m2)"],
        ),
        ("0.6.1", BLOCK, ["w: granularity block"]),
        ("2.0.0", FloatEncoding("w", 16), [f"{WHOLE} floats of 16 bits"]),
        ("2.0.0", NESTED.replace(axis=None), [f"{WHOLE} integers of 8 bits"]),
        ("2.0.0", NESTED.replace(offset=[-128, -127]), ["w: symmetric True"]),
        ("2.1.0", LPBQ, [f"{WHOLE} LPBQ of 4 bits"]),
    ],
)
def test_a_value_that_its_version_cannot_store_is_not_written(
    version: str, encoding: Entry, lost: list[str], tmp_path: Any
) -> None:
    with pytest.raises(ConversionError) as caught:
        write_encodings(one(version, encoding), tmp_path / "w.encodings")
    assert list(caught.value.lost) == lost
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("count", "names"), [(3, "w0, w1, w2"), (4, "w0, w1, w2 and 1 more")])
def test_equal_problems_of_encodings_share_a_line(count: int, names: str) -> None:
    some = tuple(BLOCK.replace(name=f"w{i}") for i in range(count))
    with pytest.raises(ConversionError) as caught:
        convert(EncodingsFile("1.0.0", some, frozenset()), "0.6.1")
    assert caught.value.lost == (f"{names}: granularity block",)


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"'3' is not one of 0\.6\.1"):
        convert(one("1.0.0", BLOCK), "3")


def test_aimets_2_0_0_and_2_1_0_are_the_same_file() -> None:
    old, new = (read_encodings(FILES / f"aimet-{v}.encodings") for v in ("2.0.0", "2.1.0"))
    assert convert(old, "2.1.0") == new
    assert convert(new, "2.0.0") == old
