"""Findings about a file, alone and with its model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from random_files import FILES

from qwlora.encodings import (
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
from qwlora.encodings.validate import finding_lines
from qwlora.errors import EncodingsFileError, MissingExtraError

onnx = pytest.importorskip("onnx")
MODEL = FILES / "model.onnx"


def model_file(path: Path) -> Path:
    """Weights of every op that implies axes; two ops read "both" along different axes."""
    from onnx import TensorProto, helper

    def weight(name: str, *dims: int, kind: int = TensorProto.FLOAT) -> Any:
        count = 1
        for dim in dims:
            count *= dim
        return helper.make_tensor(name, kind, dims, [1] * count)

    nodes = [
        helper.make_node("Conv", ["x", "conv", "bias"], ["a"]),
        helper.make_node("ConvTranspose", ["a", "deconv"], ["b"]),
        helper.make_node("Gemm", ["m", "gemm_t"], ["c"], transB=1),
        helper.make_node("Gemm", ["m", "gemm"], ["d"]),
        helper.make_node("MatMul", ["m", "matmul"], ["e"]),
        helper.make_node("Gemm", ["m", "both"], ["f"], transB=1),
        helper.make_node("MatMul", ["m", "both"], ["g"]),
        helper.make_node("Gather", ["table", "ids"], ["h"]),
        helper.make_node("Gather", ["tied", "ids"], ["i"]),
        helper.make_node("Transpose", ["tied"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["i", "head"], ["j"]),
        helper.make_node("Constant", [], ["constant"], value=weight("", 2, 2)),
        helper.make_node("Add", ["constant", "constant"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8]),
        helper.make_tensor_value_info("m", TensorProto.FLOAT, [2, 8]),
    ]
    inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, [2]))
    stored = [
        weight("conv", 4, 3, 1, 1),
        weight("bias", 4),
        weight("deconv", 4, 5, 1, 1),
        weight("gemm_t", 6, 8),
        weight("gemm", 8, 6),
        weight("matmul", 8, 7),
    ]
    stored += [weight("both", 8, 8), weight("table", 9, 4), weight("tied", 9, 4)]
    gone = [helper.make_tensor_value_info("gone", TensorProto.FLOAT, [1])]
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])],
        stored,
        value_info=gone,
    )
    onnx.save(helper.make_model(graph), str(path))
    return path


def test_axes_come_from_the_op_that_reads_the_tensor(tmp_path: Path) -> None:
    graph = read_graph(model_file(tmp_path / "m.onnx"))
    axes = {
        name: (tensor.channel_axis, tensor.block_axis)
        for name, tensor in graph.items()
        if tensor.parameter
    }
    assert axes == {
        "conv": (0, 1),
        "bias": (0, None),
        "deconv": (1, 0),
        "gemm_t": (0, 1),
        "gemm": (1, 0),
        "matmul": (1, 0),
        "both": (None, None),
        "table": (0, 1),
        "tied": (0, 1),
        "constant": (None, None),
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
    assert validate(FILES / "aimet-0.6.1.encodings") == []
    errors = [
        str(f) for f in validate(FILES / "aimet-0.6.1.encodings", MODEL) if f.severity == "error"
    ]
    assert errors == [
        "block.weight_0, scale: has shape [12], but axis 1 of [8, 6] needs [6]",
        "lpbq.weight_0, scale: has shape [24], but axis 1 of [6, 8] needs [8]",
    ]


def plumbing_file(path: Path) -> Path:
    """An attention head with shapes, positions and a mask computed in the graph.

    x [2, tokens, 8], ids [2, tokens].
    """
    from onnx import TensorProto, helper

    def constant(name: str, value: Any, kind: int = TensorProto.INT64) -> Any:
        values = value if isinstance(value, list) else [value]
        return helper.make_node(
            "Constant",
            [],
            [name],
            value=helper.make_tensor(
                "", kind, [len(values)] if isinstance(value, list) else [], values
            ),
        )

    node = helper.make_node
    nodes = [
        node("Gather", ["table", "ids"], ["embedded"]),
        node("Add", ["embedded", "x"], ["sum"]),
        node("Shape", ["ids"], ["shape"]),
        constant("one", 1),
        node("Gather", ["shape", "one"], ["tokens"]),
        constant("zero", 0),
        node("Range", ["zero", "tokens", "one"], ["positions"]),
        node("Cast", ["positions"], ["moments"], to=TensorProto.FLOAT),
        node("Greater", ["positions", "zero"], ["late"]),
        constant("nought", 0.0, TensorProto.FLOAT),
        constant("lowest", -1e9, TensorProto.FLOAT),
        node("Where", ["late", "nought", "lowest"], ["mask"]),
        node("Sub", ["mask", "moments"], ["bias"]),
        node("Transpose", ["sum"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["sum", "turned"], ["scores"]),
        node("Add", ["scores", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["weights"]),
        node("Cast", ["weights"], ["same"], to=TensorProto.FLOAT),
        node("MatMul", ["same", "sum"], ["mixed"]),
        constant("epsilon", 1e-5, TensorProto.FLOAT),
        node("Add", ["mixed", "epsilon"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, "n", 8]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [2, "n"]),
    ]
    table = helper.make_tensor("table", TensorProto.FLOAT, [9, 8], [1.0] * 72)
    graph = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, "n", 8])],
        [table],
    )
    onnx.checker.check_model(helper.make_model(graph), full_check=True)
    onnx.save(helper.make_model(graph), str(path))
    return path


def test_only_tensors_with_float_values_need_encodings(tmp_path: Path) -> None:
    graph = read_graph(plumbing_file(tmp_path / "m.onnx"))
    wanted = {name: tensor.computed_by for name, tensor in graph.items() if tensor.needs_encoding}
    computed = {
        "sum": "Add",
        "scores": "MatMul",
        "masked": "Add",
        "weights": "Softmax",
        "mixed": "MatMul",
        "y": "Add",
    }
    assert wanted == {"x": None, "table": None, **computed}


def test_every_tensor_without_its_encoding_is_a_warning(tmp_path: Path) -> None:
    model = plumbing_file(tmp_path / "m.onnx")
    every = ["x", "table", "sum", "scores", "masked", "weights", "mixed", "y"]
    for left_out in ([], ["sum"], ["table", "y"]):
        some = tuple(integers(name, 1.0) for name in every if name not in left_out)
        found = validate(EncodingsFile("1.0.0", some, frozenset({"table"} - set(left_out))), model)
        assert sorted((f.severity, f.where) for f in found) == sorted(
            ("warning", name) for name in left_out
        )
    after_the_cast = tuple(integers("same" if name == "weights" else name, 1.0) for name in every)
    assert validate(EncodingsFile("1.0.0", after_the_cast, frozenset({"table"})), model) == []


def test_equal_warnings_share_a_line(tmp_path: Path) -> None:
    findings = [Finding("warning", f"t{i}", "", "is odd") for i in range(9)] + [
        Finding("warning", "u", "", "is rare"),
        Finding("error", "t", "", "is odd"),
    ]
    assert finding_lines(findings) == [
        "error: t: is odd",
        "warning: 9 tensors (t0, t1, t2 ...): is odd",
        "warning: u: is rare",
    ]


def errors_of(tmp_path: Path, version: str, encoding: Entry, parameter: bool = True) -> list[str]:
    file = EncodingsFile(
        version,
        (encoding,),
        frozenset({encoding.name} if parameter else ()) if version < "2" else None,
    )
    return [
        str(f) for f in validate(file, model_file(tmp_path / "m.onnx")) if f.severity == "error"
    ]


def integers(
    name: str, scale: Any, axis: int | None = None, block_size: int | None = None
) -> IntegerEncoding:
    import numpy as np

    return IntegerEncoding(
        name,
        4,
        scale,
        np.full(np.shape(scale), -8),
        True,
        None if axis is None else True,
        axis,
        block_size,
    )


@pytest.mark.parametrize(
    ("version", "encoding", "error"),
    [
        (
            "1.0.0",
            integers("nobody", 1.0),
            "nobody, name: is not the name of a tensor in the graph",
        ),
        (
            "1.0.0",
            integers("m", 1.0),
            "m, section: says a parameter, but it is an activation of the graph",
        ),
        (
            "1.0.0",
            integers("gemm", [1.0] * 8),
            "gemm, scale: has shape [8], but axis 1 of [8, 6] needs [6]",
        ),
        (
            "1.0.0",
            integers("table", [1.0] * 5),
            "table, scale: has shape [5], but axis 0 of [9, 4] needs [9]",
        ),
        (
            "1.0.0",
            integers("gemm", [1.0] * 8, block_size=4),
            "gemm, scale: has shape [8], but axis 0 of [8, 6] in blocks of 4 needs [12]",
        ),
        (
            "1.0.0",
            integers("gemm", [1.0] * 16, block_size=3),
            "gemm, scale: has shape [16], but axis 0 of [8, 6] in blocks of 3 needs [12]",
        ),
        (
            "2.0.0",
            integers("gemm", [1.0] * 6, axis=2),
            "gemm, scale: axis is 2, outside a tensor of shape [8, 6]",
        ),
        (
            "2.0.0",
            integers("gemm", [1.0] * 6, axis=0),
            "gemm, scale: has shape [6], but axis 0 of [8, 6] needs [8]",
        ),
        (
            "2.0.0",
            integers("gemm", [[1.0] * 6] * 4, axis=0, block_size=4),
            "gemm, scale: has shape [4, 6], but axis 0 of [8, 6] in blocks of 4 needs [2, 6]",
        ),
        (
            "2.0.0",
            integers("gemm", [[1.0] * 5] * 2, axis=0, block_size=4),
            "gemm, scale: has shape [2, 5], but axis 0 of [8, 6] in blocks of 4 needs [2, 6]",
        ),
    ],
)
def test_scales_and_names_that_do_not_fit_the_model_are_errors(
    tmp_path: Path, version: str, encoding: Entry, error: str
) -> None:
    assert errors_of(tmp_path, version, encoding) == [error]


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
def test_scales_that_fit_the_model_are_not_errors(
    tmp_path: Path, version: str, encoding: Entry
) -> None:
    assert errors_of(tmp_path, version, encoding) == []


def test_a_parameter_listed_as_activation_is_an_error(tmp_path: Path) -> None:
    assert errors_of(tmp_path, "1.0.0", integers("gemm", 1.0), parameter=False) == [
        "gemm, section: says an activation, but it is a parameter of the graph"
    ]


def test_an_offset_outside_its_codes_is_an_error_and_an_odd_one_a_warning() -> None:
    some = [
        ("fine", 0, False),
        ("lowest", -255, False),
        ("positive", 1, False),
        ("low", -256, False),
        ("odd", -100, True),
    ]
    file = EncodingsFile(
        "1.0.0",
        tuple(
            IntegerEncoding(name, 8, [1.0, 1.0], [-128, offset], symmetric)
            for name, offset, symmetric in some
        ),
        frozenset(),
    )
    assert [(f.severity, f.where, f.field) for f in validate(file)] == [
        ("error", "positive", "offset"),
        ("error", "low", "offset"),
        ("warning", "odd", "offset"),
    ]
    assert (
        validate(file)[0].message
        == "is 1, outside [-255, 0], in 1 of 2 grids: zero is not on the grid"
    )


def test_problems_inside_the_json_are_findings(tmp_path: Path) -> None:
    path = tmp_path / "bad.encodings"
    path.write_text(
        json.dumps(
            {"version": "1.0.0", "param_encodings": [{"name": "w"}], "activation_encodings": 5}
        )
    )
    found = [str(f) for f in validate(path)]
    assert "file, activation_encodings: is 5; it must be a valid list" in found
    assert "w, bw: is missing" in found
    path.write_text("{")
    with pytest.raises(EncodingsFileError, match="is not JSON"):
        validate(path)


def test_a_value_is_validated_before_it_is_written() -> None:
    file = EncodingsFile(
        "1.0.0", (IntegerEncoding("w", 8, 1.0, 0, False, signed=True),), frozenset()
    )
    assert [f.message for f in validate(file)] == ["1.0.0 cannot hold, or needs: w: signed True"]


def test_a_file_that_is_not_onnx_says_so(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xff\xff", b"{}"):
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(EncodingsFileError, match="is not an ONNX model"):
            read_graph(tmp_path / "m.onnx")
    with pytest.raises(EncodingsFileError, match="cannot be read: No such file"):
        read_graph(tmp_path / "none.onnx")


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'qwlora\[onnx\]'"):
        read_graph(MODEL)
    assert read_encodings(FILES / "aimet-1.0.0.encodings").version == "1.0.0"
