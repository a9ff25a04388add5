"""Findings about a file, alone and with its model."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_files import FILES

from qwlora.errors import EncodingsFileError, MissingExtraError
from qwlora.formats.aimet_encodings import (
    EncodingsFile,
    Entry,
    Finding,
    IntegerEncoding,
    LpbqEncoding,
    OnnxTensor,
    read_encodings,
    read_graph,
    validate,
)
from qwlora.formats.aimet_encodings.encodings_file import finding_lines

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx.parser")
MODEL = FILES / "model.onnx"


def saved(path: Path, nodes: str, sizes: dict[str, tuple[int, ...]]) -> Path:
    """A graph in ONNX's text form with weights of these sizes, all ones."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {nodes}')
    model.graph.initializer.extend(
        onnx.helper.make_tensor(name, onnx.TensorProto.FLOAT, size, [1.0] * math.prod(size))
        for name, size in sizes.items()
    )
    onnx.save(model, str(path))
    return path


def model_file(path: Path) -> Path:
    """Weights of every op that implies axes; two ops read "both" along different axes."""
    nodes = """g (float[n, 3, 8, 8] x, float[2, 8] m, int64[2] ids) => (float[2, 2] y) {
        a = Conv(x, conv, bias)
        b = ConvTranspose(a, deconv)
        c = Gemm<transB = 1>(m, gemm_t)
        d = Gemm(m, gemm)
        e = MatMul(m, matmul)
        f = Gemm<transB = 1>(m, both)
        g = MatMul(m, both)
        h = Gather(table, ids)
        i = Gather(tied, ids)
        head = Transpose<perm = [1, 0]>(tied)
        j = MatMul(i, head)
        constant = Constant<value = float[2, 2] {1, 1, 1, 1}>()
        y = Add(constant, constant)
    }"""
    sizes: dict[str, tuple[int, ...]] = {
        **{"conv": (4, 3, 1, 1), "bias": (4,), "deconv": (4, 5, 1, 1), "gemm_t": (6, 8)},
        **{"gemm": (8, 6), "matmul": (8, 7), "both": (8, 8), "table": (9, 4), "tied": (9, 4)},
    }
    saved(path, nodes, sizes)
    model = onnx.load(path)
    gone = onnx.helper.make_tensor_value_info("gone", onnx.TensorProto.FLOAT, [1])
    model.graph.value_info.append(gone)
    onnx.save(model, path)
    return path


def test_axes_come_from_the_op_that_reads_the_tensor(tmp_path: Path) -> None:
    graph = read_graph(model_file(tmp_path / "m.onnx"))
    axes = {n: (t.channel_axis, t.block_axis) for n, t in graph.items() if t.parameter}
    assert axes == {
        **dict.fromkeys(("conv", "gemm_t", "table", "tied"), (0, 1)),
        **dict.fromkeys(("deconv", "gemm", "matmul"), (1, 0)),
        **dict.fromkeys(("both", "constant"), (None, None)),
        "bias": (0, None),
    }
    assert graph["x"] == OnnxTensor(False)
    assert graph["m"] == OnnxTensor(False, (2, 8))
    assert graph["y"] == OnnxTensor(False, (2, 2), computed_by="Add")
    assert graph["conv"].shape == (4, 3, 1, 1)
    assert not graph["ids"].needs_encoding
    assert "gone" not in graph


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0", "2.1.0"])
def test_aimets_files_fit_aimets_model(version: str) -> None:
    findings = validate(FILES / f"aimet-{version}.encodings", MODEL)
    assert [f for f in findings if f.severity == "error"] == []
    unnamed = {f.where for f in findings if "without an encoding" in f.message}
    assert unnamed == {"/channel/Conv_output_0", "onnx::MatMul_111"} | (
        {"channel.bias"} if version == "1.0.0" else set()
    )
    assert all(f.severity == "warning" for f in findings)


def test_blocks_listed_as_channels_by_0_6_1_do_not_fit_the_model() -> None:
    file = FILES / "aimet-0.6.1.encodings"
    assert validate(file) == []
    assert [str(f) for f in validate(file, MODEL) if f.severity == "error"] == [
        "block.weight_0, scale: has shape [12], but axis 1 of [8, 6] needs [6]",
        "lpbq.weight_0, scale: has shape [24], but axis 1 of [6, 8] needs [8]",
    ]


def plumbing_file(path: Path) -> Path:
    """An attention head with shapes, positions and a mask computed in the graph."""
    nodes = """g (float[2, n, 8] x, int64[2, n] ids) => (float[2, n, 8] y) {
        embedded = Gather(table, ids)
        sum = Add(embedded, x)
        shape = Shape(ids)
        one = Constant<value_int = 1>()
        tokens = Gather(shape, one)
        zero = Constant<value_int = 0>()
        positions = Range(zero, tokens, one)
        moments = Cast<to = 1>(positions)
        late = Greater(positions, zero)
        nought = Constant<value = float {0.0}>()
        lowest = Constant<value = float {-1e9}>()
        mask = Where(late, nought, lowest)
        bias = Sub(mask, moments)
        turned = Transpose<perm = [0, 2, 1]>(sum)
        scores = MatMul(sum, turned)
        masked = Add(scores, bias)
        weights = Softmax(masked)
        same = Cast<to = 1>(weights)
        mixed = MatMul(same, sum)
        epsilon = Constant<value = float {1e-5}>()
        y = Add(mixed, epsilon)
    }"""
    saved(path, nodes, {"table": (9, 8)})
    onnx.checker.check_model(onnx.load(path), full_check=True)
    return path


def test_only_tensors_with_float_values_need_encodings(tmp_path: Path) -> None:
    graph = read_graph(plumbing_file(tmp_path / "m.onnx"))
    wanted = {name: tensor.computed_by for name, tensor in graph.items() if tensor.needs_encoding}
    added, products = dict.fromkeys(("sum", "masked", "y"), "Add"), ("scores", "mixed")
    computed = {**added, **dict.fromkeys(products, "MatMul"), "weights": "Softmax"}
    assert wanted == {"x": None, "table": None, **computed}


def test_every_tensor_without_its_encoding_is_a_warning(tmp_path: Path) -> None:
    model = plumbing_file(tmp_path / "m.onnx")
    every = ["x", "table", "sum", "scores", "masked", "weights", "mixed", "y"]
    for left_out in ([], ["sum"], ["table", "y"]):
        some = tuple(integers(name, 1.0) for name in every if name not in left_out)
        found = validate(EncodingsFile("1.0.0", some, frozenset({"table"} - set(left_out))), model)
        assert {f.severity for f in found} <= {"warning"}
        assert sorted(f.where for f in found) == left_out
    after_the_cast = tuple(integers("same" if name == "weights" else name, 1.0) for name in every)
    assert validate(EncodingsFile("1.0.0", after_the_cast, frozenset({"table"})), model) == []


def test_equal_warnings_share_a_line(tmp_path: Path) -> None:
    findings = [Finding("warning", f"t{i}", "", "is odd") for i in range(9)]
    findings += [Finding("warning", "u", "", "is rare"), Finding("error", "t", "", "is odd")]
    assert finding_lines(findings) == [
        "error: t: is odd",
        "warning: 9 tensors (t0, t1, t2 ...): is odd",
        "warning: u: is rare",
    ]


def errors_of(tmp_path: Path, version: str, encoding: Entry, parameter: bool = True) -> list[str]:
    parameters = frozenset({encoding.name} if parameter else ())
    file = EncodingsFile(version, (encoding,), parameters if version < "2" else None)
    findings = validate(file, model_file(tmp_path / "m.onnx"))
    return [str(finding) for finding in findings if finding.severity == "error"]


def integers(
    name: str, scale: Any, axis: int | None = None, block_size: int | None = None
) -> IntegerEncoding:
    offset = np.full(np.shape(scale), -8)
    signed = None if axis is None else True
    return IntegerEncoding(name, 4, scale, offset, True, signed, axis, block_size)


M, IN_BLOCKS = integers("m", 1.0), "but axis 0 of [8, 6] in blocks of"
MISFITS: dict[str, tuple[str, Entry]] = {
    "nobody, name: is not the name of a tensor in the graph": ("1.0.0", integers("nobody", 1.0)),
    "m, section: says a parameter, but it is an activation of the graph": ("1.0.0", M),
    **{
        f"{name}, scale: {problem}": (version, integers(name, [1.0] * count, axis, size))
        for version, name, count, axis, size, problem in [
            ("1.0.0", "gemm", 8, None, None, "has shape [8], but axis 1 of [8, 6] needs [6]"),
            ("1.0.0", "table", 5, None, None, "has shape [5], but axis 0 of [9, 4] needs [9]"),
            ("1.0.0", "gemm", 8, None, 4, f"has shape [8], {IN_BLOCKS} 4 needs [12]"),
            ("1.0.0", "gemm", 16, None, 3, f"has shape [16], {IN_BLOCKS} 3 needs [12]"),
            ("2.0.0", "gemm", 6, 2, None, "axis is 2, outside a tensor of shape [8, 6]"),
            ("2.0.0", "gemm", 6, 0, None, "has shape [6], but axis 0 of [8, 6] needs [8]"),
        ]
    },
    **{
        f"gemm, scale: has shape [{rows}, {columns}], {IN_BLOCKS} 4 needs [2, 6]": (
            "2.0.0",
            integers("gemm", [[1.0] * columns] * rows, 0, 4),
        )
        for rows, columns in ((4, 6), (2, 5))
    },
}


@pytest.mark.parametrize("error", MISFITS)
def test_scales_and_names_that_do_not_fit_the_model_are_errors(tmp_path: Path, error: str) -> None:
    assert errors_of(tmp_path, *MISFITS[error]) == [error]


@pytest.mark.parametrize(
    ("version", "encoding"),
    [
        ("1.0.0", integers("gemm", [1.0] * 6)),
        ("1.0.0", integers("gemm", [1.0] * 12, block_size=4)),
        ("1.0.0", integers("both", [1.0] * 16, block_size=4)),
        ("1.0.0", integers("table", [1.0] * 9)),
        ("2.0.0", integers("gemm", [1.0] * 6, axis=-1)),
        ("2.0.0", integers("gemm", [[1.0] * 6] * 2, axis=0, block_size=4)),
        ("2.0.0", integers("gemm", [[1.0]] * 2, axis=0, block_size=4)),
        ("1.0.0", LpbqEncoding("gemm", 4, 4, [1] * 12, [1.0] * 6, 8)),
    ],
)
def test_scales_that_fit_are_not_errors(tmp_path: Path, version: str, encoding: Entry) -> None:
    assert errors_of(tmp_path, version, encoding) == []
    if version < "2":
        (error,) = errors_of(tmp_path, version, encoding, parameter=False)
        assert "section: says an activation, but it is a parameter of the graph" in error


def test_an_offset_outside_its_codes_is_an_error_and_an_odd_one_a_warning() -> None:
    offsets = {"fine": 0, "lowest": -255, "positive": 1, "low": -256, "odd": -100}
    entries = (
        IntegerEncoding(name, 8, [1.0, 1.0], [-128, offset], symmetric=name == "odd")
        for name, offset in offsets.items()
    )
    found = validate(EncodingsFile("1.0.0", tuple(entries), frozenset()))
    assert [f"{f.severity} {f.where} {f.field}" for f in found] == [
        "error positive offset",
        "error low offset",
        "warning odd offset",
    ]
    assert found[0].message.startswith("is 1, outside [-255, 0], in 1 of 2 grids: zero is not")


def test_problems_inside_the_json_are_findings(tmp_path: Path) -> None:
    path = tmp_path / "bad.encodings"
    sections = {"param_encodings": [{"name": "w"}], "activation_encodings": 5}
    path.write_text(json.dumps({"version": "1.0.0", **sections}))
    found = [str(f) for f in validate(path)]
    assert "file, activation_encodings: is 5; it must be a valid list" in found
    assert "w, bw: is missing" in found
    path.write_text("{")
    with pytest.raises(EncodingsFileError, match="cannot be read: Expecting"):
        validate(path)


def test_a_file_that_is_not_onnx_says_so(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xff\xff", b"{}"):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(EncodingsFileError, match="is not an ONNX model"):
            read_graph(tmp_path / "m.onnx")
    with pytest.raises(EncodingsFileError, match=r"is not an ONNX model .*No such file"):
        read_graph(tmp_path / "none.onnx")


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qwlora\[onnx\]'"):
        read_graph(MODEL)
    assert read_encodings(FILES / "aimet-1.0.0.encodings").version == "1.0.0"
