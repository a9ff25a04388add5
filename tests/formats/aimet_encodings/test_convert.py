"""Conversion between all pairs of versions.

`is_held` states what a version can express, independently of the code under test.
"""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_files import DECOMPRESSED_BITWIDTH, FILES, encodings, files

from qwlora.errors import ConversionError
from qwlora.formats.aimet_encodings import (
    VERSIONS,
    BlockOrder,
    EncodingsFile,
    Entry,
    FloatEncoding,
    IntegerEncoding,
    LpbqEncoding,
    OnnxTensor,
    convert,
    read_encodings,
    read_graph,
)
from qwlora.formats.aimet_encodings.encodings_file import parse, to_document


def through_json(file: EncodingsFile) -> EncodingsFile:
    again, findings = parse(to_document(file))
    assert again is not None, findings
    return again


def is_held(e: Entry, source: str, target: str) -> bool:
    """Whether `target` can express an encoding, given its graph and decompressed bitwidth."""
    to_split, from_split = target < "2", source < "2"
    if isinstance(e, FloatEncoding):
        return to_split == from_split
    if isinstance(e, LpbqEncoding):
        return target != "0.6.1" and (
            to_split or not from_split or e.decompressed_bitwidth == DECOMPRESSED_BITWIDTH
        )
    if target == "0.6.1" and (e.block_size is not None or e.scale.shape == (1,)):
        return False
    if to_split:
        return from_split or e.signed == e.symmetric
    return not from_split or e.symmetric == bool((e.offset == -(2 ** (e.bitwidth - 1))).all())


@pytest.mark.parametrize(("source", "target"), [(a, b) for a in VERSIONS for b in VERSIONS])
@settings(max_examples=25)  # for each of 16 pairs
@given(st.data())
def test_what_does_not_come_back_is_listed(source: str, target: str, data: st.DataObject) -> None:
    file, graph = data.draw(files(source))
    known = {"graph": graph, "decompressed_bitwidth": DECOMPRESSED_BITWIDTH}
    lost = {e.name for e in file.encodings if not is_held(e, source, target)}
    if lost:
        with pytest.raises(ConversionError) as caught:
            convert(file, target, **known)
        assert caught.value.lost
        assert not caught.value.lacking
        kept = through_json(convert(file, target, lossy=True, **known))
        assert convert(kept, target, **known) == kept
        assert {e.name for e in file.encodings} - lost <= kept.by_name.keys()
    else:
        there = through_json(convert(file, target, **known))
        assert there.version == target
        positive = tuple(
            e.replace(axis=0) if getattr(e, "axis", None) == -2 else e for e in file.encodings
        )
        back = through_json(convert(there, source, **known))
        if source < "2" <= target:  # they say how the file came about, and change no grid
            file = file.replace(excluded_layers=None, quantizer_args=None)
        assert back == file.replace(encodings=positive)


@given(st.data())
def test_dequantized_values_are_the_same_in_every_version(data: st.DataObject) -> None:
    """1.0.0: `(q + offset) * scale`; 2.0.0: `(q - y_zero_point) * y_scale`; from the JSON."""
    encoding, tensor = data.draw(
        encodings("1.0.0").filter(
            lambda pair: isinstance(pair[0], IntegerEncoding) and pair[0].granularity == "channel"
        )
    )
    assert isinstance(encoding, IntegerEncoding)
    file = EncodingsFile("1.0.0", (encoding,), frozenset({"w"}))
    (old,) = to_document(file)["param_encodings"]
    new = to_document(convert(file, "2.0.0", lossy=True, graph={"w": tensor}))["encodings"][0]
    signed = new["output_dtype"].startswith("int")
    for code in (0, 1, 2 ** old["bw"] - 1):
        stored = code - 2 ** (old["bw"] - 1) if signed else code
        for i, scale in enumerate(old["scale"]):
            shift = old.get("zero_point_shift", [0] * len(old["scale"]))[i]
            zero_point = new.get("y_zero_point", [0] * len(old["scale"]))[i]
            assert (code + old["offset"][i] + shift) * scale == (stored - zero_point) * new[
                "y_scale"
            ][i]


CONV = {"w": OnnxTensor(True, (2, 6), 0, 1)}
CHANNEL = IntegerEncoding("w", 4, [0.1, 0.2], [-8, -8], True)
BLOCK = IntegerEncoding("w", 4, [0.1, 0.2, 0.3, 0.4], [-8] * 4, True, block_size=3)
LPBQ = LpbqEncoding("w", 4, 3, [1, 2, 3, 4], [0.1, 0.2], 8)
SIGNED = IntegerEncoding("w", 8, 0.1, -128, True, True)


WHOLE, BACK = "w: the whole encoding,", "w: to come back needs its"
SYMMETRIC = IntegerEncoding("w", 8, [0.1, 0.2], [-128, -128], True, True, axis=0)
FLOAT8 = FloatEncoding("w", 8, "float8e5m2", 1.0)
TWO_AXES = LpbqEncoding("w", 4, 2, [[1, 2, 3, 4]] * 2, [[0.1, 0.2], [0.3, 0.4]], axis=1)


def one(version: str, encoding: Entry, **fields: Any) -> EncodingsFile:
    parameters = frozenset({"w"}) if version < "2" else None
    return EncodingsFile(version, (encoding,), parameters, **fields)


@pytest.mark.parametrize(
    ("source", "encoding", "target", "lost"),
    [
        ("1.0.0", BLOCK, "0.6.1", "w: granularity block"),
        ("1.0.0", LPBQ, "0.6.1", f"{WHOLE} LPBQ of 4 bits"),
        ("1.0.0", LPBQ, "2.1.0", f"{BACK} decompressed bitwidth (--decompressed-bitwidth)"),
        ("1.0.0", FloatEncoding("w", 16), "2.0.0", f"{WHOLE} floats of 16 bits"),
        ("1.0.0", IntegerEncoding("w", 8, 0.1, -128, False), "2.0.0", "w: symmetric False"),
        ("1.0.0", IntegerEncoding("w", 8, 0.1, 0, True), "2.0.0", "w: symmetric True"),
        ("1.0.0", IntegerEncoding("w", 8, [0.1], [-128], True), "0.6.1", "w: granularity channel"),
        (
            "2.0.0",
            SYMMETRIC.replace(scale=[0.1] * 6, offset=[-128] * 6, axis=1),
            "1.0.0",
            f"{BACK} channel axis: there are 6 scales, but axis 0 has 2 in the graph",
        ),
        ("2.0.0", IntegerEncoding("w", 8, 0.1, -128, True, False), "1.0.0", "w: signed False"),
        ("2.0.0", IntegerEncoding("w", 8, 0.1, -100, False, True), "1.0.0", "w: signed True"),
        ("2.0.0", FLOAT8, "1.0.0", f"{WHOLE} floats of 8 bits (float8e5m2)"),
        ("2.0.0", TWO_AXES, "2.1.0", f"{WHOLE} LPBQ of 4 bits"),
    ],
)
def test_only_what_is_lost_is_named(source: str, encoding: Entry, target: str, lost: str) -> None:
    with pytest.raises(ConversionError, match="--lossy") as caught:
        convert(one(source, encoding), target, graph=CONV)
    assert (list(caught.value.lost), caught.value.lacking) == ([lost], ())


def test_without_a_graph_the_sections_are_lost_to_2_x() -> None:
    entry = IntegerEncoding("w", 8, 0.1, -128, True)
    file = one("1.0.0", entry, excluded_layers=(), quantizer_args={})
    bookkeeping = convert(file, "2.0.0", graph=CONV)
    assert (bookkeeping.excluded_layers, bookkeeping.quantizer_args) == (None, None)
    with pytest.raises(ConversionError) as caught:
        convert(file, "2.0.0")
    assert list(caught.value.lost) == ["w: whether it is a parameter or an activation"]
    kept = convert(file, "2.0.0", lossy=True)
    assert (kept.parameters, kept.excluded_layers, kept.quantizer_args) == (None, None, None)


NEW_LPBQ = LpbqEncoding("w", 4, 3, [[1, 2]], [[0.1]], axis=1)


@pytest.mark.parametrize(
    ("source", "encoding", "target", "graph", "lacking"),
    [
        ("1.0.0", CHANNEL, "2.0.0", None, "w: its channel axis; give the model's graph"),
        ("1.0.0", BLOCK, "2.0.0", None, "w: its block axis and the shape"),
        ("1.0.0", BLOCK, "2.0.0", (6, 2, 1, 0), "w: the order of its block scales.*--block-order"),
        ("1.0.0", BLOCK, "2.0.0", (2, 9, 0, 1), r"blocks of 3 on a tensor of \[2, 9\] are not 4"),
        ("1.0.0", CHANNEL, "2.0.0", (3, 2, 0, 1), "there are 2 scales, but axis 0 has 3"),
        ("1.0.0", LPBQ, "2.1.0", None, "w: its block axis"),
        ("2.0.0", NEW_LPBQ, "1.0.0", (2, 6, 0, 1), "decompressed bitwidth"),
        ("2.0.0", SIGNED, "1.0.0", None, "whether it is a parameter"),
    ],
)
@pytest.mark.parametrize("lossy", [False, True])
def test_what_is_lacking_is_never_invented(
    source: str, encoding: Entry, target: str, graph: Any, lacking: str, lossy: bool
) -> None:
    """`graph` is the tensor's sizes, channel axis and block axis."""
    tensors = {"w": OnnxTensor(True, graph[:2], *graph[2:])} if graph else {}
    with pytest.raises(ConversionError, match=lacking):
        convert(one(source, encoding), target, lossy, graph=tensors)


@pytest.mark.parametrize(("count", "lines"), [(3, 3), (4, 1)])
def test_equal_problems_of_many_encodings_share_a_line(count: int, lines: int) -> None:
    some = tuple(IntegerEncoding(f"w{i}", 8, 0.1, -128, False) for i in range(count))
    with pytest.raises(ConversionError) as caught:
        convert(EncodingsFile("1.0.0", some, frozenset()), "2.0.0")
    lost = [line for line in caught.value.lost if "symmetric False" in line]
    assert len(lost) == lines
    assert (lost == ["4 encodings (w0, w1, w2 ...): symmetric False"]) == (lines == 1)


def test_an_unknown_version_or_order_is_refused() -> None:
    with pytest.raises(ConversionError, match=r"'3' is not one of 0\.6\.1"):
        convert(one("1.0.0", CHANNEL), "3")
    with pytest.raises(ConversionError, match="'rows' is not one of channel, tensor"):
        convert(one("1.0.0", BLOCK), "2.0.0", block_order="rows")  # type: ignore[arg-type]


def test_aimets_2_0_0_and_2_1_0_are_the_same_file() -> None:
    old, new = (read_encodings(FILES / f"aimet-{v}.encodings") for v in ("2.0.0", "2.1.0"))
    assert convert(old, "2.1.0") == new
    assert convert(new, "2.0.0") == old


def test_blocks_that_0_6_1_lists_as_channels_do_not_become_channels() -> None:
    pytest.importorskip("onnx")
    old, graph = read_encodings(FILES / "aimet-0.6.1.encodings"), read_graph(FILES / "model.onnx")
    with pytest.raises(ConversionError, match=r"block.weight_0: its channel axis: .* 12 scales"):
        convert(old, "1.0.0", graph=graph)


def test_aimets_1_0_0_converts_to_its_2_0_0() -> None:
    """AIMET wrote both files; its two simulations differ only in float8 weights and biases."""
    pytest.importorskip("onnx")
    graph = read_graph(FILES / "model.onnx")
    old = read_encodings(FILES / "aimet-1.0.0.encodings")
    new = read_encodings(FILES / "aimet-2.0.0.encodings").by_name
    open_order = {"block.weight_0", "lpbq.weight_0"}
    with pytest.raises(ConversionError) as caught:
        convert(old, "2.0.0", lossy=True, graph=graph)
    assert {line.split(":")[0] for line in caught.value.lacking} == open_order
    converted = convert(old, "2.0.0", lossy=True, graph=graph, block_order="tensor").by_name
    assert [name for name, e in converted.items() if e != new.get(name)] == ["y", "float8.weight_0"]
    wrong = convert(old, "2.0.0", lossy=True, graph=graph, block_order="channel").by_name
    assert [name for name in open_order if wrong[name] == new[name]] == []


def test_aimets_older_exporter_lists_blocks_by_output_channel() -> None:
    """With the order given, its scales equal those of the newer exporter's 2.0.0."""
    pytest.importorskip("onnx")
    names = {"block.weight": "block.weight_0", "lpbq.weight": "lpbq.weight_0"}
    graph_of_model = read_graph(FILES / "model.onnx")
    old = read_encodings(FILES / "aimet-export-1.0.0.encodings")
    new = read_encodings(FILES / "aimet-2.0.0.encodings").by_name
    some = tuple(e for e in old.encodings if e.name in names)
    file = EncodingsFile("1.0.0", some, frozenset(names))
    graph = {name: graph_of_model[other] for name, other in names.items()}
    converted = convert(file, "2.0.0", lossy=True, graph=graph, block_order="channel").by_name
    for name, other in names.items():
        assert converted[name].replace(name=other) == new[other]


MATMUL = OnnxTensor(True, (6, 2), 1, 0)


@pytest.mark.parametrize("target", ["2.0.0", "2.1.0"])
@pytest.mark.parametrize("encoding", [BLOCK, LPBQ], ids=["block", "LPBQ"])
@pytest.mark.parametrize(
    ("order", "nested"), [("tensor", [[1, 2], [3, 4]]), ("channel", [[1, 3], [2, 4]])]
)
def test_both_orders_come_back(
    order: BlockOrder, nested: list[list[int]], encoding: Entry, target: str
) -> None:
    known = {"graph": {"w": MATMUL}, "block_order": order, "decompressed_bitwidth": 8}
    file = one("1.0.0", encoding)
    there = convert(file, target, lossy=isinstance(encoding, LpbqEncoding), **known)
    (found,) = there.encodings
    scale = found.block_scale if isinstance(found, LpbqEncoding) else (found.scale * 10).round()
    assert scale.tolist() == nested
    assert through_json(convert(through_json(there), "1.0.0", **known)) == file


def test_our_own_files_need_no_block_order() -> None:
    graph = {"w": MATMUL}
    file = one("1.0.0", BLOCK, producer={"package": "qwlora", "version": "1"})
    converted = convert(file, "2.0.0", graph=graph)
    assert converted == convert(file, "2.0.0", graph=graph, block_order="tensor")
    assert convert(converted, "1.0.0", graph=graph) == file
    with pytest.raises(ConversionError, match="--block-order") as caught:  # whoever flattens it
        convert(converted.replace(producer=None), "1.0.0", graph=graph)
    assert caught.value.lost
    with pytest.raises(ConversionError, match="the order of its block scales"):
        convert(file.replace(producer={"package": "aimet-torch"}), "2.0.0", graph=graph)
