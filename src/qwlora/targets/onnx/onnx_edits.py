"""Edits of an `onnx_ir.Model` in place; how it is read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwlora.errors import ExportError, foreign_as
from qwlora.nn.packed_tensor import narrowest
from qwlora.system.optional_packages import require

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
_LEAST_NARROWED = 2**14  # numbers of a matrix; others would save nothing worth a node
_READERS = {"Gather", "Gemm", "MatMul", "Transpose"}  # of embeddings and weights, not of scales


def load_graph(path: Path) -> Any:
    """The `onnx_ir.Model` in a file."""
    with foreign_as(ExportError, f"{str(path)!r} is not an ONNX model"):
        return require("onnx_ir", "onnx").load(path)


def save_graph(model: Any, path: Path, data: str | None = DATA_FILE, smallest: int = 256) -> None:
    """Write a model.

    Args:
        data: the file for tensors of `smallest` bytes and more; None: they are in the model's file,
            or stay where they are.
    """
    require("onnx_ir", "onnx").save(model, path, external_data=data, size_threshold_bytes=smallest)


def store_narrow(model: Any, bits: int) -> None:
    """Store embeddings and matrices of products that are floats in 16 bits where that is exact.

    What is gathered from one is cast to float32 after it, so that a runtime keeps the table as it
    is stored. Other readers get the matrix cast, which ONNX Runtime folds when it loads the model,
    as it folds the transpose of a head.

    Args:
        bits: 16; 32 changes nothing.
    """
    ir = require("onnx_ir", "onnx")
    import ml_dtypes

    for name, value in [*model.graph.initializers.items()] if bits == 16 else ():
        tensor, uses = value.const_value, list(value.uses())
        is_matrix = {node.op_type for node, _ in uses} <= _READERS and len(tensor.shape) == 2
        if not is_matrix or value.is_graph_input() or tensor.size < _LEAST_NARROWED:
            continue
        narrow = narrowest(tensor_of(value)) if tensor.dtype == ir.DataType.FLOAT else None
        if narrow is None or narrow.dtype == torch.float32:
            continue
        kind = np.float16 if narrow.dtype == torch.float16 else ml_dtypes.bfloat16
        stored, cast = constant(model, name, narrow.view(torch.int16).numpy().view(kind)), None
        to = {"to": int(ir.DataType.FLOAT)}
        for node, index in uses:
            if node.op_type == "Gather":
                node.replace_input_with(index, stored)
                rows, called = node.outputs[0], node.outputs[0].name
                rows.name = f"{called}.narrow"
                wide = new_node("Cast", [rows], called, to)
                replace_value(rows, wide.outputs[0])
                wide.replace_input_with(0, rows)
                rows.type = ir.TensorType(stored.dtype)
                model.graph.insert_after(node, wide)
                continue
            if cast is None:
                cast = new_node("Cast", [stored], f"{name}.wide", to)
                model.graph.insert_before(model.graph[0], cast)
            node.replace_input_with(index, cast.outputs[0])


def numbers(value: Any) -> np.ndarray[Any, Any]:
    """The array of an initializer."""
    array: np.ndarray[Any, Any] = value.const_value.numpy()
    return array


def tensor_of(value: Any) -> torch.Tensor:
    """A copy of an initializer's values."""
    return torch.from_numpy(np.array(numbers(value)))


def constant(model: Any, name: str, array: Any) -> Any:
    """An initializer in place of one of that name, if there is one."""
    ir = require("onnx_ir", "onnx")
    value = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
    model.graph.initializers.pop(name, None)
    model.graph.register_initializer(value)
    return value


def constants(model: Any, name: str, parts: Mapping[str, Any]) -> list[Any]:
    """Initializers `name.part`."""
    return [constant(model, f"{name}.{part}", array) for part, array in parts.items()]


def new_node(
    operator: str,
    inputs: Sequence[Any],
    name: str,
    attributes: Mapping[str, Any] | None = None,
    domain: str = "",
) -> Any:
    """A node whose output has the same name."""
    node = require("onnx_ir", "onnx").node(operator, inputs, attributes, domain=domain, name=name)
    node.outputs[0].name = name
    return node


def replace_value(old: Any, new: Any) -> None:
    """Let everything that reads `old` read `new`. An output of the graph keeps its name."""
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.before", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def insert_rounding(
    model: Any, value: Any, name: str, grid: Sequence[Any], users: Sequence[Any], codes: str = ""
) -> Any:
    """Quantize and dequantize a value after its producer, for some of its users.

    Args:
        name: of the result.
        grid: values of scale and zero point.
        codes: name of the result's codes. Default: `name.codes`.

    Returns:
        the result.
    """
    quantize = new_node("QuantizeLinear", [value, *grid], codes or f"{name}.codes")
    rounded = new_node("DequantizeLinear", [quantize.outputs[0], *grid], name)
    for user in users:
        for index, source in enumerate(user.inputs):
            if source is value:
                user.replace_input_with(index, rounded.outputs[0])
    if (producer := value.producer()) is None:
        model.graph.insert_before(model.graph[0], [quantize, rounded])
    else:
        model.graph.insert_after(producer, [quantize, rounded])
    result = rounded.outputs[0]
    result.type, result.shape = value.type, value.shape
    return result


def remove_unused(model: Any) -> None:
    """Remove what no output depends on."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def add_input(
    model: Any,
    name: str,
    default: np.ndarray[Any, Any],
    shape: Sequence[int | str],
    replaced: Any = None,
) -> Any:
    """Add an input with a default to an `onnx_ir.Model`.

    Args:
        shape: with names for axes of any size; it says more than that of the default.
        replaced: the initializer that the input takes the place of.
    """
    ir = require("onnx_ir", "onnx")
    tensor = ir.tensor(default, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor
    )
    if replaced is not None:
        ir.convenience.replace_all_uses_with(replaced, value)
        model.graph.initializers.pop(replaced.name, None)
    model.graph.register_initializer(value)
    model.graph.inputs.append(value)
    return value


def write_adapter_file(values: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Write an adapter file of ONNX Runtime: values of inputs that have a default, by name. It
    takes no scalars, and of integers only those of 8 bits and more."""
    runtime = require("onnxruntime", "onnx")
    written = runtime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters(
        {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()}
    )
    written.export_adapter(str(path))
