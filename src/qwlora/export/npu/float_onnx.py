"""A captured graph as float ONNX: no QuantizeLinear nodes, every grid described beside the file.

    weight `n`        initializer `n`, float32, already on its grid: (q + offset) * scale
    activation `n`    tensor `n`, not rounded
    constant `n`      an activation that no input changes (cos and sin of fixed positions):
                      an initializer, on its grid

AIMET, AI Hub and the QAIRT converter take this form: rounding a stored weight on the stated grid
gives the frozen base's codes again, bit for bit. The weight of a Linear layer is stored [in, out],
as the right operand of its MatMul. A weight that is also read as it is (a tied embedding) is stored
twice; the turned copy is `n.transposed`. An embedding with a grid per row, which neither AIMET nor
an NPU can gather from, is stored on the grid of what is gathered: the result is the same, bit for
bit. What is gathered from an embedding with one grid of 8 or 16 bits has that grid.

Shapes are fixed, since an NPU has no others: everything that only depends on them is folded.

What only moves values of a tensor (Reshape, Slice, Concat ...) has that tensor's grid, and its name
with the operator appended, so tensors of one name have one grid in graphs of any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora.errors import ExportError, listed
from qwlora.export.onnx.onnx_graph import DEQUANTIZE, MARKER, to_onnx
from qwlora.export.onnx.onnx_model import (
    OPSET,
    check_names,
    codes_of,
    is_matrix_transpose,
    replace_marker,
)
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.encoding import Encoding
from qwlora.nn.custom_ops import NAMESPACE
from qwlora.system.optional_packages import require

_NO_LIMIT = 2**40
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
) | {"Tile", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class TensorEncoding:
    """The grid of one tensor of the file.

    Args:
        transposed: the tensor is stored [in, out]; `encoding` is of [out, in].
        parameter: it is an initializer.
        carried: the tensor only moves values of another one, and got that one's grid.
    """

    encoding: Encoding
    transposed: bool = False
    parameter: bool = False
    carried: bool = False


@dataclass(frozen=True)
class FloatOnnx:
    """An `onnx_ir.Model` and the grids of its tensors by name, activations first."""

    model: Any
    encodings: dict[str, TensorEncoding]


def to_float_onnx(
    graph: QuantizedGraph, inputs: Mapping[str, Tensor], opset: int = OPSET
) -> FloatOnnx:
    """The float model of `graph` with the shapes of `inputs`.

    Raises:
        ExportError: an operator has no translation, a weight has float offsets, two tensors would
            have the same name, or the graph does not fit the shapes of `inputs`.
        MissingExtraError: the `onnx` extra is not installed.
    """
    _refuse_float_offsets(graph)
    model = to_onnx(graph, opset)
    _fix_shapes(model, graph, inputs)
    rewriter = _FloatRewriter(model, graph)
    rewriter.run()
    _store_gathered(model, rewriter.encodings)
    _carry(model, rewriter.encodings)
    _name_moved(model, rewriter.encodings)
    model.producer_name = "qwlora"
    ordered = sorted(rewriter.encodings.items(), key=lambda item: item[1].parameter)
    return FloatOnnx(model, dict(ordered))


def _refuse_float_offsets(graph: QuantizedGraph) -> None:
    wrong = [n for n, encoding in graph.encodings.items() if encoding.scheme.float_offset]
    if wrong:
        raise ExportError(
            f"{listed(wrong, 3)} {'has' if len(wrong) == 1 else 'have'} float offsets, which no "
            "encodings file and no NPU has. Quantize with base.solver: gptq, or export to onnx"
        )


def _fix_shapes(model: Any, graph: QuantizedGraph, inputs: Mapping[str, Tensor]) -> None:
    """Give the graph's inputs the shapes of `inputs`, and fold what then is constant.

    Markers stay, so a value with an encoding is never folded into another one.
    """
    from onnx_ir.passes.common import LiftConstantsToInitializersPass, RemoveUnusedNodesPass
    from onnxscript.optimizer import fold_constants

    ir = require("onnx_ir", "onnx")
    sizes: dict[str, int] = {}
    for name in graph.inputs:
        for axis, size in zip(graph.interface.shapes[name], inputs[name].shape, strict=True):
            if sizes.setdefault(str(axis), size) != size or (
                isinstance(axis, int) and axis != size
            ):
                raise ExportError(
                    f"input {name} has shape {list(inputs[name].shape)}, but the graph takes "
                    f"{list(graph.interface.shapes[name])}"
                )
    for value in [*model.graph.inputs, *model.graph.outputs]:
        shape = graph.interface.shapes[value.name]
        value.shape = ir.Shape([sizes.get(str(axis), axis) for axis in shape])
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output() and node.op_type != DEQUANTIZE:
                output.shape = None  # torch's private symbols
    limits = {"input_size_limit": _NO_LIMIT, "output_size_limit": _NO_LIMIT}
    fold_constants(model, onnx_shape_inference=True, **limits)
    RemoveUnusedNodesPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


class _FloatRewriter:
    """Removes markers, and gives their values the names of their encodings."""

    def __init__(self, model: Any, graph: QuantizedGraph):
        self.model, self.graph = model, graph
        self.ir = require("onnx_ir", "onnx")
        self.encodings: dict[str, TensorEncoding] = {}

    def run(self) -> None:
        from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

        kinds = {mark.name: mark.kind for mark in self.graph.marks}
        for node in [n for n in self.model.graph if n.domain == NAMESPACE and n.op_type == MARKER]:
            name = node.attributes["name"].value
            rewrite = self._activation if kinds[name] is Kind.ACTIVATION else self._weight
            rewrite(node, name, self.graph.encodings[name])
        RemoveUnusedNodesPass()(self.model)
        self.model.graph.opset_imports.pop(NAMESPACE, None)
        self._check()
        ShapeInferencePass()(self.model)

    def _activation(self, node: Any, name: str, encoding: Encoding) -> None:
        source = node.inputs[0]
        is_constant = source.const_value is not None
        self.encodings[name] = TensorEncoding(encoding, parameter=is_constant)
        if is_constant:
            values = encoding.fake_quantize(torch.from_numpy(np.array(source.const_value.numpy())))
            replace_marker(self.model, node, self._initializer(name, values))
            return
        is_named = source.is_graph_input() or source.name in self.encodings
        if is_named and source.name != name:  # one value with two names
            identity = self.ir.node("Identity", [source])
            self.model.graph.insert_before(node, identity)
            source = identity.outputs[0]
            source.type, source.shape = node.inputs[0].type, node.inputs[0].shape
        source.name = name
        replace_marker(self.model, node, source)

    def _weight(self, node: Any, name: str, encoding: Encoding) -> None:
        source, uses = node.inputs[0], [user for user, _ in node.outputs[0].uses()]
        values = encoding.dequantize(codes_of(source, encoding)).float()
        turned = [user for user in uses if is_matrix_transpose(user)]
        if turned:
            own = name if len(turned) == len(uses) else f"{name}.transposed"
            initializer = self._initializer(own, values.T)
            self.encodings[own] = TensorEncoding(encoding, transposed=True, parameter=True)
            for user in turned:
                self.ir.convenience.replace_all_uses_with(user.outputs[0], initializer)
                self.model.graph.remove(user, safe=True)
        if len(turned) < len(uses):
            initializer = self._initializer(name, values)
            self.encodings[name] = TensorEncoding(encoding, parameter=True)
            self.ir.convenience.replace_all_uses_with(node.outputs[0], initializer)
        self.model.graph.remove(node, safe=True)

    def _initializer(self, name: str, values: Tensor) -> Any:
        array = values.detach().contiguous().numpy()
        value = self.ir.val(name, const_value=self.ir.tensor(array, name=name))
        self.model.graph.initializers.pop(name, None)  # the float weight that it replaces
        self.model.graph.register_initializer(value)
        return value

    def _check(self) -> None:
        used = {v for node in self.model.graph for v in node.inputs if v is not None}
        initializers = self.model.graph.initializers
        for name in [n for n, value in initializers.items() if value not in used]:
            if not initializers[name].is_graph_output():
                del initializers[name]
        check_names(self.model, self.encodings)


def _store_gathered(model: Any, encodings: dict[str, TensorEncoding]) -> None:
    """Give each table and the rows that are read from it one grid: that of the rows, if the table
    has several, else that of the table."""
    ir = require("onnx_ir", "onnx")
    for node in model.graph:
        if node.op_type != "Gather" or node.inputs[0].name not in encodings:
            continue
        table, rows = node.inputs[0], encodings.get(node.outputs[0].name)
        if rows is None:
            continue
        grid = encodings[table.name].encoding
        if not grid.scale.ndim and grid.scheme.bitwidth in (8, 16):
            encodings[node.outputs[0].name] = TensorEncoding(grid)
        if not grid.scale.ndim or len(table.uses()) > 1:
            continue
        values = torch.from_numpy(np.array(table.const_value.numpy()))
        rounded = rows.encoding.fake_quantize(values).numpy()
        table.const_value = ir.tensor(rounded, name=table.name)
        encodings[table.name] = TensorEncoding(rows.encoding, parameter=True)


def _carry(model: Any, encodings: dict[str, TensorEncoding]) -> None:
    """Give what only moves values of one grid (Reshape, Slice, Concat ...) the same grid."""
    for node in model.graph:
        sources = _moved_inputs(node)
        if not sources or any(source.name not in encodings for source in sources):
            continue
        first = encodings[sources[0].name]
        if first.encoding.scale.ndim or any(
            not first.encoding.equals(encodings[source.name].encoding) for source in sources
        ):
            continue
        for output in node.outputs:
            if output.name not in encodings:
                encodings[output.name] = TensorEncoding(first.encoding, carried=True)


def _name_moved(model: Any, encodings: dict[str, TensorEncoding]) -> None:
    """Name each tensor with a carried grid after the tensor whose values it moves."""
    taken = {value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value}
    for node in model.graph:
        for output in node.outputs:
            entry = encodings.get(output.name)
            if entry is None or not entry.carried or output.is_graph_output():
                continue
            stem = f"{_moved_inputs(node)[0].name}.{node.op_type.lower()}"
            names = (stem, *(f"{stem}_{number}" for number in range(1, len(taken) + 1)))
            name = next(name for name in names if name not in taken)
            encodings[name] = encodings.pop(output.name)
            output.name = name
            taken.add(name)


def _moved_inputs(node: Any) -> list[Any]:
    if node.domain or node.op_type not in MOVES:
        return []
    return list(node.inputs) if node.op_type == "Concat" else [node.inputs[0]]
