"""Write an ONNX model: markers become QuantizeLinear and DequantizeLinear, weights become integers.

    activation `n`    QuantizeLinear -> `n.codes` -> DequantizeLinear -> `n`
    input `n`         the same, but the result is `n.dequantized`: the input itself is called `n`
    weight `n`        initializer `n.codes` -> DequantizeLinear -> `n`
    float offsets     initializer `n.codes` -> DequantizeLinear without zero point -> `n.scaled`
                      -> Add `n.minimum`, per block -> `n`

Codes are int4, int8 or int16, unsigned if the grid is asymmetric. The name of an encoding is the
name of its tensor. The weight of a Linear layer is stored [in, out], as the right operand of its
MatMul: ONNX Runtime fuses that form into MatMulNBits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qwlora.errors import ExportError, listed
from qwlora.export.onnx.onnx_graph import DEQUANTIZE, MARKER, to_onnx
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.encoding import Encoding, aligned
from qwlora.grid.packing import unpack
from qwlora.grid.scheme import Blocks, PerChannel, PerTensor
from qwlora.nn.custom_ops import NAMESPACE
from qwlora.system.optional_packages import require

OPSET = 21  # the first with int4, 16-bit and blocked DequantizeLinear
OF_INPUT = ".dequantized"  # of a quantized input's name: its value on its grid
MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"


def write_onnx(graph: QuantizedGraph, folder: Path, metadata: Mapping[str, str]) -> set[str]:
    """Write `model.onnx` and its external data into `folder`.

    Returns:
        names of the weights that are stored [in, out].

    Raises:
        ExportError: an operator has no translation, activations have a bitwidth other than 8 or 16,
            or two tensors have the same name.
        MissingExtraError: the `onnx` extra is not installed.
    """
    model, transposed = build_model(graph, metadata)
    require("onnx_ir", "onnx").save(model, folder / MODEL_FILE, external_data=DATA_FILE)
    return transposed


def build_model(
    graph: QuantizedGraph, metadata: Mapping[str, str], opset: int = OPSET
) -> tuple[Any, set[str]]:
    """The `onnx_ir.Model` that `write_onnx` writes, and the weights that are stored [in, out].

    Raises:
        ExportError, MissingExtraError: see `write_onnx`.
    """
    model = to_onnx(graph, opset)
    rewriter = _Rewriter(model, graph)
    rewriter.run()
    _name_dimensions(model, graph.interface.shapes)
    model.producer_name = "qwlora"
    model.metadata_props.update(metadata)
    return model, rewriter.transposed


class _Rewriter:
    def __init__(self, model: Any, graph: QuantizedGraph):
        self.model, self.graph = model, graph
        self.ir = require("onnx_ir", "onnx")
        self.transposed: set[str] = set()
        self.inputs = {value.name for value in model.graph.inputs}
        # By tensor of the model and whether it is transposed: tied weights share initializers.
        self.initializers: dict[tuple[int, bool], list[Any]] = {}

    def run(self) -> None:
        kinds = {mark.name: mark.kind for mark in self.graph.marks}
        for node in [n for n in self.model.graph if n.domain == NAMESPACE and n.op_type == MARKER]:
            name = node.attributes["name"].value
            encoding = self.graph.encodings[name]
            if kinds[name] is Kind.ACTIVATION:
                self._activation(node, name, encoding)
            else:
                self._weight(node, name, encoding, right_operand=kinds[name] is not Kind.PARAMETER)
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        RemoveUnusedNodesPass()(self.model)
        self.model.graph.opset_imports.pop(NAMESPACE, None)
        check_names(self.model, self.graph.encodings)

    def _activation(self, node: Any, name: str, encoding: Encoding) -> None:
        grid = [
            self._initializer(f"{name}{part}", array)
            for part, array in activation_arrays(name, encoding).items()
        ]
        codes = self.ir.node("QuantizeLinear", [node.inputs[0], *grid], name=f"{name}/quantize")
        codes.outputs[0].name = f"{name}.codes"
        inputs = [codes.outputs[0], *grid]
        values = self.ir.node("DequantizeLinear", inputs, name=f"{name}/dequantize")
        self._replace(node, [codes, values], activation_tensor(name, self.inputs))

    def _weight(self, node: Any, name: str, encoding: Encoding, right_operand: bool) -> None:
        readers = [user for user, _ in node.outputs[0].uses()]
        transposed = right_operand and bool(readers) and all(map(is_matrix_transpose, readers))
        inputs, axis = self._weight_initializers(node.inputs[0], name, encoding, transposed)
        nodes = [
            self.ir.node("DequantizeLinear", inputs, attributes=axis, name=f"{name}/dequantize")
        ]
        if encoding.scheme.float_offset:
            nodes[0].outputs[0].name = f"{name}.scaled"
            shape = tuple(node.inputs[0].shape)
            nodes += self._add_minimum(nodes[0].outputs[0], name, encoding, transposed, shape)
        self._replace(node, nodes, name)
        if transposed:
            self.transposed.add(name)
            for user in readers:
                value = nodes[-1].outputs[0]
                self.ir.convenience.replace_all_uses_with(user.outputs[0], value)
                self.model.graph.remove(user, safe=True)

    def _add_minimum(
        self, scaled: Any, name: str, encoding: Encoding, transposed: bool, shape: tuple[int, ...]
    ) -> list[Any]:
        """Nodes that add each group's minimum to a weight of `shape`; blocks become an axis."""
        granularity = encoding.scheme.granularity
        minimum = aligned(encoding.minimum, granularity, len(shape))
        if not isinstance(granularity, Blocks):
            minimum = minimum.mT if transposed and minimum.ndim else minimum
            steps = [("Add", "minimum", minimum.contiguous().numpy(), "add")]
        else:
            (rows, columns), size = shape, granularity.size
            split, whole = [rows, columns // size, size], [rows, columns]
            if transposed:
                minimum, split, whole = minimum.permute(1, 2, 0), [*split[1:], rows], whole[::-1]
            steps = [
                ("Reshape", "blocks", np.array(split), "split"),
                ("Add", "minimum", minimum.contiguous().numpy(), "add"),
                ("Reshape", "whole", np.array(whole), "join"),
            ]
        nodes = list[Any]()
        for operator, part, array, step in steps:
            inputs = [scaled, self._initializer(f"{name}.{part}", array)]
            nodes.append(self.ir.node(operator, inputs, name=f"{name}/{step}"))
            scaled = nodes[-1].outputs[0]
            scaled.name = f"{name}.{step}"
        return nodes

    def _weight_initializers(
        self, value: Any, name: str, encoding: Encoding, transposed: bool
    ) -> tuple[list[Any], dict[str, Any]]:
        """Codes, scale and, if asymmetric, zero point; tied weights share them."""
        attributes = _axis_attributes(encoding, transposed, len(value.shape))
        key = (id(value), transposed)
        if key not in self.initializers:
            arrays = weight_arrays(codes_of(value, encoding), encoding, transposed)
            made = [self._initializer(f"{name}{part}", array) for part, array in arrays.items()]
            self.initializers[key] = made
        return self.initializers[key], attributes

    def _initializer(self, name: str, array: np.ndarray[Any, Any]) -> Any:
        ir = self.ir
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self.model.graph.register_initializer(value)
        return value

    def _replace(self, node: Any, new: list[Any], name: str) -> None:
        """Replace a marker by `new`, whose last output is called `name`."""
        old, value = node.outputs[0], new[-1].outputs[0]
        value.name, value.type, value.shape = name, old.type, old.shape
        self.model.graph.insert_before(node, new)
        replace_marker(self.model, node, value)


def replace_marker(model: Any, node: Any, value: Any) -> None:
    """Replace a marker by `value`. A graph output keeps its own name, after an Identity."""
    ir, old = require("onnx_ir", "onnx"), node.outputs[0]
    if old.is_graph_output():
        identity = ir.node("Identity", [value])
        output = identity.outputs[0]
        output.type, output.shape = old.type, old.shape
        output.name, old.name = old.name, f"{old.name}.marker"
        model.graph.insert_before(node, identity)
        for index, other in enumerate(model.graph.outputs):
            if other is old:
                model.graph.outputs[index] = output
    ir.convenience.replace_all_uses_with(old, value)
    model.graph.remove(node, safe=True)


def check_names(model: Any, encodings: Collection[str]) -> None:
    """Check that tensors have distinct names, and that each encoding is of one of them.

    Raises:
        ExportError: two have the same name, or an encoding has no tensor.
    """
    computed = [output.name for node in model.graph for output in node.outputs]
    stored = [*model.graph.inputs, *model.graph.initializers.values()]
    counts = Counter([*(value.name for value in stored), *computed])
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise ExportError(f"two tensors of the exported graph have the name {repeated[0]}")
    if missing := [name for name in encodings if name not in counts]:
        raise ExportError(f"encodings without a tensor in the exported graph: {listed(missing, 3)}")


def activation_arrays(name: str, encoding: Encoding) -> dict[str, np.ndarray[Any, Any]]:
    """The grid of an activation as its QuantizeLinear takes it, by suffix of the initializer's
    name.

    Raises:
        ExportError: the grid has other than 8 or 16 bits.
    """
    bits = encoding.scheme.bitwidth
    if bits not in (8, 16):
        raise ExportError(
            f"{name}: ONNX has no {bits}-bit QuantizeLinear for activations; use 8 or 16 bits"
        )
    return {
        ".scale": encoding.scale.cpu().numpy(),
        ".zero_point": (-encoding.offset).cpu().numpy().astype(f"uint{bits}"),
    }


def weight_arrays(
    codes: torch.Tensor, encoding: Encoding, transposed: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Codes, scale and, if asymmetric, zero point of a weight as its DequantizeLinear takes them,
    by suffix of the initializer's name.

    Args:
        codes: [out, in].
        transposed: the arrays are [in, out].
    """
    turn = (lambda t: t.T) if transposed else (lambda t: t)
    scale = encoding.scale if encoding.scale.ndim < 2 else turn(encoding.scale)
    kind = _container(encoding)
    shift = encoding.scheme.symmetric_offset if encoding.scheme.symmetric else 0
    whole = (turn(codes).to(torch.int32) + shift).contiguous()
    found = {
        ".codes": whole.cpu().numpy().astype(kind),
        ".scale": scale.contiguous().cpu().numpy(),
    }
    if not (encoding.scheme.symmetric or encoding.scheme.float_offset):
        offset = encoding.offset if encoding.offset.ndim < 2 else turn(encoding.offset)
        found[".zero_point"] = (-offset).contiguous().cpu().numpy().astype(kind)
    return found


def activation_tensor(name: str, inputs: Collection[str]) -> str:
    """The tensor that has the quantized value of the encoding `name`."""
    return f"{name}{OF_INPUT}" if name in inputs else name


def codes_of(value: Any, encoding: Encoding) -> torch.Tensor:
    """Codes of a weight: those of a packed layer, or of an adapter's float weight, rounded."""
    producer = value.producer()
    if producer is not None and producer.domain == NAMESPACE and producer.op_type == DEQUANTIZE:
        packed = torch.from_numpy(np.array(producer.inputs[0].const_value.numpy()))
        return unpack(packed, encoding.scheme.bitwidth, value.shape[-1])
    return encoding.quantize(torch.from_numpy(np.array(value.const_value.numpy())))


def is_matrix_transpose(node: Any) -> bool:
    """Whether a node swaps the axes of a matrix."""
    return node.op_type == "Transpose" and list(node.attributes["perm"].value) == [1, 0]


def _axis_attributes(encoding: Encoding, transposed: bool, ndim: int) -> dict[str, Any]:
    match encoding.scheme.granularity:
        case PerChannel(axis):
            return {"axis": 1 - axis if transposed else axis}
        case Blocks(size):  # ONNX holds the product of both factors
            return {"axis": 0 if transposed else ndim - 1, "block_size": size}
        case PerTensor():
            return {}


def _container(encoding: Encoding) -> Any:
    """The narrowest ONNX integer type for the codes."""
    import ml_dtypes

    bits, signed = encoding.scheme.bitwidth, encoding.scheme.symmetric
    if bits <= 4:
        return ml_dtypes.int4 if signed else ml_dtypes.uint4
    return np.dtype(f"{'int' if signed else 'uint'}{8 if bits <= 8 else 16}")


def _name_dimensions(model: Any, shapes: Mapping[str, tuple[str | int, ...]]) -> None:
    """Give inputs and outputs the shapes of the captured graph, with names for variable axes."""
    ir = require("onnx_ir", "onnx")
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.shape = ir.Shape(shapes[value.name])
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None  # torch's private symbols; runtimes infer their own


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
