"""Reading and writing encodings files: AIMET's own, malformed fields, hostile bytes, atomicity; and
what `qwlora encodings` prints of them."""

import copy
import json
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_files import FILES

from cli.command_line import answered, refused
from qwlora.errors import ConversionError, EncodingsFileError
from qwlora.formats.aimet_encodings import (
    VERSIONS,
    EncodingsFile,
    FloatEncoding,
    IntegerEncoding,
    read_encodings,
    write_encodings,
)
from qwlora.formats.aimet_encodings.encodings_file import parse, to_document

GOLDEN = {
    version: json.loads((FILES / f"aimet-{version}.encodings").read_text())
    for version in (*VERSIONS, "export-1.0.0")
}


@pytest.mark.parametrize("version", GOLDEN)
def test_an_aimet_file_is_read_and_written_back(version: str, tmp_path: Path) -> None:
    document = copy.deepcopy(GOLDEN[version])
    assert document["producer"] == {"package": "aimet-torch", "version": "2.42.0"}
    if version == "2.1.0":  # AIMET writes this axis from the end, beside a positive one
        scale = next(e for e in document["encodings"] if e["name"] == "lpbq.weight_0")["y_scale"]
        assert scale["axis"] == -1
        scale["axis"] = 1
    file = read_encodings(FILES / f"aimet-{version}.encodings")
    assert to_document(file) == document
    write_encodings(file, str(tmp_path / "out.encodings"))
    assert read_encodings(tmp_path / "out.encodings") == file
    assert [p.name for p in tmp_path.iterdir()] == ["out.encodings"]
    lines = (tmp_path / "out.encodings").read_text().splitlines()
    assert all(any(json.dumps(name) in line for line in lines) for name in file.by_name)
    assert len(lines) == len(file.encodings) + (10 if file.version < "2" else 6)


@pytest.mark.parametrize("name", ["aimet-modules.json", "aimet-export-1.0.0_torch.encodings"])
def test_aimets_files_by_module_are_read_as_0_6_1(name: str) -> None:
    """Whatever version they state; the same simulation as the exported files."""
    file, exported = (read_encodings(FILES / n) for n in (name, "aimet-0.6.1.encodings"))
    stated, entries = json.loads((FILES / name).read_text()), file.by_name
    assert stated.get("version") == (None if name.endswith("json") else "1.0.0")
    assert (file.version, file.producer["package"]) == ("0.6.1", "aimet-torch")  # type: ignore[index]
    assert file.parameters == stated["param_encodings"].keys()
    same = {"channel.weight": "channel.weight", "shifted.weight": "shifted.weight_0"}
    for mine, theirs in {**same, "channel.input.0": "x"}.items():
        assert entries[mine] == exported.by_name[theirs].replace(name=mine)
    assert entries["block.output.0"].bitwidth == 8
    assert isinstance(entries["float16.weight"], FloatEncoding)
    assert parse(to_document(file))[0] == file  # it is an ordinary file from here on


def test_files_that_others_write_are_read() -> None:
    """Parameters alone, as after AdaRound; offsets that aimet-onnx 2.42.0 writes as floats."""
    items = GOLDEN["0.6.1"]["param_encodings"]
    file, _ = parse({"param_encodings": items})
    assert file is not None
    assert file.parameters == items.keys() == file.by_name.keys()
    grid = {"offset": -33401.0, "scale": 0.0003704806509939822}
    old = {**grid, "bitwidth": 16, "dtype": "int", "is_symmetric": "False"}
    old |= {"max": 11.905025239040624, "min": -12.37442422385}
    new = {"name": "a", "bw": 16, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False}
    new |= {key: [value] for key, value in grid.items()}
    for version, entries, none in (("0.6.1", {"a": [old]}, {}), ("1.0.0", [new], [])):
        sections = {"activation_encodings": entries, "param_encodings": none}
        file, problems = parse({"version": version, **sections})
        assert not problems
        assert file.by_name["a"].offset.tolist() == -33401  # type: ignore[union-attr]


@pytest.mark.parametrize("version", VERSIONS)
def test_aimets_files_have_the_same_grids_in_every_version(version: str) -> None:
    """The four files hold the same simulation."""
    encodings = read_encodings(FILES / f"aimet-{version}.encodings").by_name
    channel, shifted, x = (encodings[n] for n in ("channel.weight", "shifted.weight_0", "x"))
    assert (channel.scale[0], channel.offset.tolist()) == (0.0008904206333681941, [-128] * 4)
    axes = (0, True) if version > "2" else (None, None)
    assert (channel.symmetric, channel.axis, channel.signed) == (True, *axes)
    assert (shifted.zero_point_shift, shifted.offset.tolist()) == (0.5, [-2] * 4)
    assert (x.scale, x.offset, x.symmetric) == (0.014587393961846828, -149, False)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else children:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


KEYS = st.sampled_from(["x", "x_scale", "axis", "name", "scale", "offset"])
NUMBERS = [-0.0, 1e308, 5e-324, 2**63, 10**400]
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(NUMBERS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=5,
)
PATHS = {version: list(nodes(document)) for version, document in GOLDEN.items()}


@pytest.mark.parametrize("version", VERSIONS)
@given(st.data())
def test_a_changed_file_is_refused_or_written_back(version: str, data: st.DataObject) -> None:
    document = copy.deepcopy(GOLDEN[version])
    for _ in range(data.draw(st.integers(1, 3))):
        *outer, last = data.draw(st.sampled_from(PATHS[version]))
        target = document
        try:
            for key in outer:
                target = target[key]
            if data.draw(st.booleans()):
                target[last] = data.draw(JUNK)
            else:
                del target[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took this place away
    file, problems = parse(document)
    assert (file is None) == bool(problems)
    assert all(0 < len(problem) < 1000 for problem in problems)
    if file is not None:
        assert parse(to_document(file)) == (file, [])


CHANNEL = GOLDEN["0.6.1"]["param_encodings"]["channel.weight"][0]
VECTORS = {"fc.weight": [CHANNEL | {"vector_dim": 2, "index_bw": 6}]}
PICKLES = (b"PK\3\4", b"\x80\4\x95", b"\x58" + 7 * b"\0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"{", "line 1 column 2"),
        (b"\xff", "'utf-8' codec"),
        (b"[" * 100_000, "maximum recursion depth"),
        (b'{"a":' * 100_000, "maximum recursion depth"),
        (b"[" + b"9" * 5000 + b"]", "4300 digits"),
        (b'{"version": "1.0.0", "version": "1.0.0"}', "the key 'version' twice"),
        *((start + b'{"a":', "is a pickle") for start in PICKLES),
        (b"[]", "file: is a list; an object is needed"),
        (b"{}", "file, version: is missing"),
        (b'{"version": "0.7"}', "version: is '0.7'; one of 0.6.1, 1.0.0, 2.0.0, 2.1.0 is"),
        (b'{"version": "2.0.0", "encodings": [], "x": []}', "file, x: is not a field"),
        # files by module, and what is left of them
        *(
            (json.dumps({"activation_encodings": {"fc": module}, "param_encodings": {}}), message)
            for module, message in (
                ({"input": {"0": {"dtype": "int"}}}, r"fc\.input\.0, bitwidth: is missing"),
                ({"input": [1]}, "fc: is an object; a module has objects input and output"),
                ({"sideways": {}}, "fc: is an object; a module has objects input and output"),
            )
        ),
        (json.dumps({"param_encodings": VECTORS}), "fc.weight: is vector quantization"),
        # names are escaped and cut
        (json.dumps({"version": "2.0.0", "encodings": [{"name": "\x1b" * 9999}]}), r"x1b.{0,300}$"),
    ],
)
def test_an_invalid_file_says_why(tmp_path: Path, content: bytes | str, message: str) -> None:
    path = tmp_path / "bad.encodings"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(EncodingsFileError, match=message) as caught:
        read_encodings(path)
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)


def changed(version: str, section: str, name: str, **fields: Any) -> dict[str, Any]:
    """AIMET's file with fields of one entry replaced, or removed if the value is `...`."""
    document = copy.deepcopy(GOLDEN[version])
    entries = document[section]
    if version == "0.6.1":
        (entry, *_) = entries[name]
    else:
        (entry,) = (e for e in entries if e["name"] == name)
    entry.update(fields)
    for key in [key for key, value in fields.items() if value is ...]:
        del entry[key]
    return document


# By version, section and entry: fields, and what is said about them.
BAD_FIELDS: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {
    ("0.6.1", "param_encodings", "channel.weight"): {
        "bitwidth: is a list; it must be a whole number": {"bitwidth": 4}
    },
    ("0.6.1", "activation_encodings", "x"): {
        "bitwidth is 33, not from 1 to 32": {"bitwidth": 33},
        "is_symmetric: is False; it must be 'True' or 'False'": {"is_symmetric": False},
        "min is -3.0 in item 0, but scale and offset make it -2.17": {"min": -3.0},
        "max is missing": {"max": ...},
        "index_bw: is not a field of this entry": {"index_bw": 4},
    },
    ("1.0.0", "activation_encodings", "x"): {
        "scale: 1 of 1 values are not finite": {"scale": [math.nan]},
        "scale must be above 0 and at most 3.4e\\+38": {"scale": [1e39]},
        "scale: contains True; numbers in lists": {"scale": [True]},
        "scale: contains an integer that is too large": {"scale": [10**400]},
        "scale: has 2 axes": {"scale": [[0.1]]},
        "scale has 2 values; PER_TENSOR has one": {"scale": [0.1, 0.2], "offset": [0, 0]},
        "offset: contains 1180591620717411303424; the limit": {"offset": [2**70]},
        "offset: contains -0.5; integers are needed": {"offset": [-0.5]},
        "enc_type: is 'OTHER'; it must be 'PER_TENSOR', 'PER_CHANNEL'": {"enc_type": "OTHER"},
        r"is vector quantization \(VECTOR, of GPTVQ\)": {"enc_type": "VECTOR", "index_bw": 6},
        "bw: is missing": {"bw": ...},
    },
    ("1.0.0", "param_encodings", "channel.weight"): {
        "offset has 1 values, but scale has 4": {"offset": [-128]},
        "block_size is not a field of this kind of entry": {"block_size": 2},
    },
    ("1.0.0", "param_encodings", "block.weight_0"): {
        "block_size is -1; an integer from 1": {"block_size": -1}
    },
    ("1.0.0", "param_encodings", "shifted.weight_0"): {
        "zero_point_shift must be a list as long as scale": {"zero_point_shift": [0.5]}
    },
    ("1.0.0", "param_encodings", "lpbq.weight_0"): {
        "9 compressed of 8 decompressed bits is not possible": {"compressed_bw": 9},
        "block scales reach 16; 5 compressed of 8 decompressed bits end at 8": {"compressed_bw": 5},
        "LPBQ is symmetric: is_sym is true, and each offset -128": {"offset": [0] * 8},
        r"\[8\] channel scales cannot share \[9\]": {"per_block_int_scale": [1] * 9},
    },
    ("2.0.0", "encodings", "x"): {
        "output_dtype: is 'int33'": {"output_dtype": "int33"},
        "y_zero_point must hold integers": {"y_zero_point": 0.25},
        "y_zero_point has shape \\[1\\], but y_scale \\[\\]": {"y_zero_point": [149]},
        "scale is one number; with an axis": {"axis": 0},
    },
    ("2.0.0", "encodings", "channel.weight"): {
        "y_zero_point must hold integers within": {"y_zero_point": [-0.5, 0, 0, 0]},
        "axis is missing; a y_scale that is a list needs one": {"axis": ...},
    },
    ("2.0.0", "encodings", "block.weight_0"): {
        "axis is 2, outside scales of 2 axes": {"axis": 2},
        "scale has 2 axes; without an axis and a block_size": {"block_size": ...},
        "y_scale: contains a list; numbers in lists": {"y_scale": [[0.1], [0.1, 0.2]]},
        "y_scale: is empty": {"y_scale": []},
    },
    ("2.0.0", "encodings", "lpbq.weight_0"): {
        "output_dtype must be int1 to int32: LPBQ": {"output_dtype": "uint4"},
        r"\[1, 3\] channel scales cannot": {"per_channel_float_scale": [[0.1] * 3]},
    },
    ("2.1.0", "encodings", "x"): {
        "axis is missing": {"per_block_int_scale": [1]},
        "is NVFP4": {"y_scale": {"x": [[1.0]], "x_scale": 1.0, "input_dtype": "float8e4m3fn"}},
    },
    ("2.1.0", "encodings", "lpbq.weight_0"): {
        "y_scale.x_scale has 1 values, but axis 1 of x has 2": {
            "y_scale": {"x": [[1, 2]], "x_scale": [0.1], "axis": 1}
        },
        "y_scale.axis is 2, outside": {"y_scale": {"x": [[1, 2]], "x_scale": [0.1], "axis": 2}},
        "y_scale.n: is not a field": {"y_scale": {"x": [[1]], "x_scale": [1], "axis": 0, "n": 1}},
    },
}


@pytest.mark.parametrize(
    ("entry", "fields", "message"),
    [(entry, f, message) for entry, rows in BAD_FIELDS.items() for message, f in rows.items()],
)
def test_a_bad_field_is_named(entry: tuple[str, ...], fields: Any, message: str) -> None:
    file, problems = parse(changed(*entry, **fields))
    assert file is None
    assert any(re.search(f"^{entry[2]}[:,] {message}", problem) for problem in problems)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    document = changed("1.0.0", "activation_encodings", "x", scale=[-1.0], bw=0)
    document["param_encodings"].append({"name": "new"})
    document["mystery"] = 1
    (tmp_path / "bad.encodings").write_text(json.dumps(document))
    said = refused("encodings", tmp_path / "bad.encodings")
    for part in ("x: bitwidth is 0", "new, bw: is missing", "file, mystery: is not a field"):
        assert part in said
        assert part in "\n".join(parse(document)[1])
    assert "none.encodings: 1 problem" in refused("encodings", "none.encodings")
    assert "cannot be read" in refused("encodings", __file__)
    document = copy.deepcopy(GOLDEN["1.0.0"])
    document["param_encodings"].append(document["activation_encodings"][0])
    assert parse(document) == (None, ["file: 'x': two encodings have this name"])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.encodings"
    path.write_text("before")
    entry = IntegerEncoding("w", 8, 0.1, 0, False, signed=True)
    with pytest.raises(ConversionError, match="w: signed True"):
        write_encodings(EncodingsFile("1.0.0", (entry,), frozenset()), path)
    file = EncodingsFile("1.0.0", (), frozenset(), quantizer_args={"x": math.nan})
    with pytest.raises(EncodingsFileError, match="is nan; it must be a finite number"):
        write_encodings(file, path)
    with pytest.raises(ConversionError, match="'9' is not one of"):
        write_encodings(EncodingsFile("9", ()), path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_encodings(EncodingsFile("2.0.0", ()), tmp_path / "nowhere" / "out")
    with pytest.raises(EncodingsFileError, match=r"cannot be read: .*No such file"):
        read_encodings(tmp_path / "nowhere")
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.encodings"]


INTEGERS = partial(IntegerEncoding, "w", 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: INTEGERS([0.1, 0.2], [0], False), r"scale has shape \[2\] but offset \[1\]"),
        (lambda: INTEGERS([0.1, 0.1], [-1, -0.5], False), r"offset holds -0\.5; integers are"),
        (lambda: INTEGERS(0.1, float("inf"), False), "offset holds inf; integers are needed"),
        (lambda: INTEGERS(-0.1, 0, False), "scale must be above 0"),
        (lambda: INTEGERS(0.1, 0, False, zero_point_shift=0.25), r"_shift is 0\.25, not 0 or 0.5"),
        (lambda: FloatEncoding("w", 4, "float8e5m2", 1.0), "'float8e5m2' is not a float format"),
        (lambda: FloatEncoding("w", 16, scale=1.0), "a scale but no format"),
        (lambda: EncodingsFile("2.0.0", (FloatEncoding("w", 16),) * 2), "'w': two encodings"),
        (lambda: EncodingsFile("1.0.0", (), frozenset({"v"})), "'v': .*parameter.* no encoding"),
    ],
)
def test_invalid_values_are_refused(make: Any, message: str) -> None:
    with pytest.raises(EncodingsFileError, match=message):
        make()
    with pytest.raises(ValueError, match="read-only"):
        INTEGERS([0.1], [0], False).scale[0] = 1.0


def test_show_lists_every_encoding_in_text_and_json() -> None:
    new, old = (FILES / f"aimet-{version}.encodings" for version in ("2.0.0", "1.0.0"))
    lines = answered("encodings", new).splitlines()
    assert len(lines) == 16
    assert lines[0] == "version 2.0.0, by aimet-torch 2.42.0, 14 encodings"
    (block,) = (line for line in lines if line.startswith("block.weight_0 "))
    cells = ["block.weight_0", "-", "int4 symmetric", "block axis 0 of 4"]
    assert re.split(" {2,}", block) == [*cells, "0.0261785 .. 0.0502113", "-8"]
    pattern = "block.weight_0 +parameter +int4 symmetric +block of 4 "
    assert re.search(pattern, answered("encodings", old))
    record = json.loads(answered("encodings", old, "--json"))
    assert (record["version"], len(record["encodings"])) == ("1.0.0", 13)
    assert "x" not in record["parameters"]
    entry = next(e for e in record["encodings"] if e["name"] == "x")
    numbers = {"bitwidth": 8, "scale": 0.014587393961846828, "offset": -149}
    layout = {"granularity": "tensor", "axis": None, "block_size": None, "zero_point_shift": 0.0}
    assert entry == {"name": "x", **numbers, "symmetric": False, "signed": None, **layout}
