"""A captured graph as float ONNX: no QuantizeLinear nodes, every grid described beside the file.

    weight `n`        initializer `n`, float32, already on its grid: (q + offset) * scale
    activation `n`    tensor `n`, not rounded
    constant `n`      an activation that no input changes (cos and sin of fixed positions):
                      an initializer, on its grid

AIMET, AI Hub and the QAIRT converter take this form: rounding a stored weight on the stated grid
gives the frozen base's codes again, bit for bit. The weight of a Linear layer is stored [in, out],
as the right operand of its MatMul. A weight that is also read as it is (a tied embedding) is stored
twice; the turned copy is `n.transposed`. Shapes are fixed, since an NPU has no others.

AIMET and QAIRT take causal language models as graphs with a key-value cache, of several sizes, with
RMSNormalization as one operator (opset 23). All have the same weights and names; tensors of one
name have one encoding. Every float tensor has one, but for values inside an activation function
that the model makes of several operators, and inside a norm of an opset before 23. With `policy:
weights-only`, only parameters have grids, and all else is float16 on the device.

`FloatOnnxModel` runs such a model in ONNX Runtime, and checks model and encodings against each
other. Everything comes from the delivered files, nothing from the simulation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from torch import Tensor

from qwlora.errors import EncodingsFileError, ExportError, GridError, SourceError, foreign_as
from qwlora.formats.aimet_encodings.documents import printable
from qwlora.formats.aimet_encodings.encodings_file import read_encodings
from qwlora.formats.aimet_encodings.grids import TensorLayout, grid_of, write_graph_encodings
from qwlora.formats.aimet_encodings.model import EncodingsFile, FloatEncoding
from qwlora.graph.capture import IDS
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.grid.encoding import Encoding, encoding_from_range
from qwlora.grid.scheme import Scheme
from qwlora.simulation.kv_cache_graph import cached_graph, capture_with_cache
from qwlora.system.optional_packages import require
from qwlora.targets.npu.genie import genie_layout
from qwlora.targets.npu.htp_rewrites import OPSET as NPU_OPSET
from qwlora.targets.npu.kv_cache_graphs import graph_sizes
from qwlora.targets.npu.npu_graph import NpuGraph, mask_floor, npu_form
from qwlora.targets.onnx.onnx_model import (
    DEQUANTIZE,
    OPSET,
    activation_arrays,
    activation_tensor,
    codes_of,
    constant,
    constants,
    insert_rounding,
    is_matrix_transpose,
    load_graph,
    new_node,
    numbers,
    remove_unused,
    replace_marker,
    rewrite_markers,
    tensor_of,
    to_onnx,
)
from qwlora.targets.onnx.onnx_runtime import (
    EIGHT_BIT_OPTIONS,
    SESSION_OPTIONS,
    OnnxModel,
    open_model,
)
from qwlora.targets.refusals import Subject, Weight, refuse
from qwlora.targets.target import ExportedGraph

_OLDEST = 18  # that torch.onnx translates to
_RANGES = {"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Erf": (-1.0, 1.0)}
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze"}
) | {"Tile", "Transpose", "Unsqueeze"}


@dataclass(frozen=True)
class FloatOnnx:
    """A graph as an `onnx_ir.Model`, and the grids of its tensors by name: of parameters, if they
    are of initializers. Those `transposed` are stored [in, out], their grids are of [out, in]."""

    graph: QuantizedGraph
    model: Any
    encodings: dict[str, Encoding] = field(default_factory=dict)
    transposed: set[str] = field(default_factory=set)

    def write_encodings(self, path: Path, version: str) -> None:
        """Write every encoding of the model; see `write_graph_encodings`."""
        graph, floats = self.model.graph, list[str]()
        if self.graph.has_float_activations:
            kind = require("onnx_ir", "onnx").DataType.FLOAT
            values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
            is_float = {value.name: value.dtype == kind for value in values}
            floats = [n for n, stays in is_float.items() if stays and n not in self.encodings]
        float_model = self.encodings, self.encodings.keys() & graph.initializers.keys(), floats
        write_graph_encodings(self.graph, path, self.transposed, version, float_model)

    def take_activation(self, node: Any, name: str, encoding: Encoding) -> None:
        """Remove the marker of an activation; its value gets the name of its encoding."""
        source = node.inputs[0]
        if source.const_value is not None:
            source = self._stored(name, encoding.fake_quantize(tensor_of(source)))
        elif (source.is_graph_input() or source.name in self.encodings) and source.name != name:
            # One value has two names. `FloatOnnxModel.load` calls the DequantizeLinear of an
            # encoding by its name, so each name needs a tensor of its own.
            identity = new_node("Identity", [source], f"{name}.identity")
            self.model.graph.insert_before(node, identity)
            identity.outputs[0].type, identity.outputs[0].shape = source.type, source.shape
            source = identity.outputs[0]
        source.name = name
        self.encodings[name] = encoding
        replace_marker(self.model, node, source)

    def take_weight(self, node: Any, name: str, encoding: Encoding) -> None:
        """Replace the marker of a weight by its values."""
        source, readers = node.inputs[0], [user for user, _ in node.outputs[0].uses()]
        values = encoding.dequantize(codes_of(source, encoding)).float()
        turned = [user for user in readers if is_matrix_transpose(user)]
        if turned:
            copy = name if len(turned) == len(readers) else f"{name}.transposed"
            initializer = self._stored(copy, values.T)
            self.encodings[copy] = encoding
            self.transposed.add(copy)
            for user in turned:
                user.outputs[0].replace_all_uses_with(initializer)
                self.model.graph.remove(user, safe=True)
        if turned and len(turned) == len(readers):
            self.model.graph.remove(node, safe=True)
        else:
            replace_marker(self.model, node, self._stored(name, values))
            self.encodings[name] = encoding

    def _stored(self, name: str, values: Tensor) -> Any:
        return constant(self.model, name, values.detach().contiguous().numpy())


def float_graphs(
    cases: Mapping[str, ExportedGraph], name: str
) -> Iterator[tuple[str, FloatOnnx, NpuGraph]]:
    """One of the graphs of `ExportedGraph.graphs`, or `FORWARD`, for one use case after another."""
    # captured once: simulations of use cases differ in tensors and encodings only
    first = next(iter(cases.values()))
    if first.graphs and IDS not in first.sample:
        raise ExportError("golden inputs are missing. Give `sample`: one batch with input_ids")
    sizes = graph_sizes(first)[name]
    captured = capture_with_cache(first.simulation, sizes)
    cached = {name: cached_graph(case.simulation, captured) for name, case in cases.items()}
    # all use cases share one host graph, which writes the mask
    floor = min(mask_floor(graph) for graph in cached.values())
    for case, graph in cached.items():
        npu = npu_form(graph, sizes, floor, None)
        npu = genie_layout(npu, None) if first.layout else npu
        shapes = npu.device.interface.shapes
        float_onnx = to_float_onnx(npu.device, shapes, first.opset, for_npu=True)
        float_onnx.model.metadata_props.update(cases[case].metadata)
        yield case, float_onnx, npu


def to_float_onnx(
    graph: QuantizedGraph,
    shapes: Mapping[str, Sequence[int | str]],
    opset: int | None = None,
    for_npu: bool = False,
) -> FloatOnnx:
    """The float model of `graph`.

    Args:
        shapes: of the inputs, by name.
        opset: default: 23 for an NPU, else 21. Operators that an older one lacks are written as
            those that it has.
        for_npu: with norms as one operator, and an encoding for every float tensor; see the module.

    Raises:
        ExportError: an operator has no translation, or no encodings file can hold a weight's grid.
        MissingExtraError: the `onnx` extra is not installed.
    """
    weights = {name: Weight(encoding.scheme) for name, encoding in graph.encodings.items()}
    refuse(["aimet"], Subject(weights=weights), ExportError)
    opset = opset or (NPU_OPSET if for_npu else OPSET)
    model = to_onnx(graph, max(opset, _OLDEST))
    _fix_shapes_(model, graph, shapes)
    result = FloatOnnx(graph, model)
    rewrite_markers(model, graph, result.take_activation, result.take_weight)
    from onnx_ir.passes.common import ShapeInferencePass

    ShapeInferencePass()(model)
    # before `_carry_`: rows may get their table's grid, and what moves them must have the same
    _store_gathered_(model, result.encodings, graph.has_float_activations)
    moves = MOVES - {"Gather"} if graph.has_float_activations else MOVES
    _carry_(model, result.encodings, moves)
    model.producer_name = "qwlora"
    if for_npu and not graph.has_float_activations:
        _encode_rest_(model, result.encodings)
    if opset < _OLDEST:
        _lower_(model, opset)
    return result


def _lower_(model: Any, opset: int) -> None:
    """Write operators of opset 18 as 17 has them."""
    axes = require("onnx_ir", "onnx").AttrInt64s
    for node in model.graph:
        is_reduction = node.op_type.startswith("Reduce") and len(node.inputs) > 1
        # Axes are an input since opset 18, those of ReduceSum since 13.
        if is_reduction and node.op_type != "ReduceSum":
            node.attributes["axes"] = axes("axes", numbers(node.inputs[1]).tolist())
            node.attributes.pop("noop_with_empty_axes", None)
            node.resize_inputs(1)
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)
    remove_unused(model)
    model.graph.opset_imports[""] = opset


def _fix_shapes_(
    model: Any, graph: QuantizedGraph, shapes: Mapping[str, Sequence[int | str]]
) -> None:
    """Give the graph's inputs fixed shapes, and fold what then is constant."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass
    from onnxscript.optimizer import fold_constants

    ir = require("onnx_ir", "onnx")
    sizes = {
        str(axis): size
        for name in graph.interface.inputs
        for axis, size in zip(graph.interface.shapes[name], shapes[name], strict=True)
    }
    for value in [*model.graph.inputs, *model.graph.outputs]:
        shape = graph.interface.shapes[value.name]
        value.shape = ir.Shape([sizes.get(str(axis), axis) for axis in shape])
    for node in model.graph:
        for output in node.outputs:
            # These shapes hold torch's private symbols, and the sizes are numbers now.
            if not output.is_graph_output() and node.op_type != DEQUANTIZE:
                output.shape = None
    # Markers are still nodes, so a value with an encoding is never folded into another one.
    limits = dict.fromkeys(("input_size_limit", "output_size_limit"), 2**40)
    fold_constants(model, onnx_shape_inference=True, **limits)
    remove_unused(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def _store_gathered_(model: Any, encodings: dict[str, Encoding], has_float_rows: bool) -> None:
    """Give each table and the rows that are read from it one grid: that of the rows, if the table
    has several, else that of the table. For float rows, such a table is of floats, too."""
    # aimet-onnx refuses rows with another grid than an 8-bit table strictly in 2.0.0, and neither
    # AIMET nor an NPU gathers from a table with a grid per row. Rounding the table on the grid of
    # the rows gives the same rows, bit for bit.
    for node in model.graph:
        if node.op_type != "Gather" or node.inputs[0].name not in encodings:
            continue
        table, rows = node.inputs[0], encodings.get(node.outputs[0].name)
        grid = encodings[table.name]
        if rows is None:
            if has_float_rows and grid.scale.ndim and len(table.uses()) == 1:
                del encodings[table.name]
            continue
        if not grid.scale.ndim and grid.scheme.bitwidth in (8, 16):
            encodings[node.outputs[0].name] = grid
        if not grid.scale.ndim or len(table.uses()) > 1:
            continue
        rounded = rows.fake_quantize(tensor_of(table)).numpy()
        table.const_value = require("onnx_ir", "onnx").tensor(rounded, name=table.name)
        encodings[table.name] = rows


def _carry_(model: Any, encodings: dict[str, Encoding], moves: Collection[str]) -> None:
    """Give what only moves values of one grid (Reshape, Slice, Concat ...) the same grid."""
    # Names come from what is moved, since torch numbers them differently in graphs of other sizes,
    # and tensors of one name need one encoding in all graphs.
    taken = {value.name for node in model.graph for value in (*node.inputs, *node.outputs) if value}
    for node in model.graph:
        if node.domain or node.op_type not in moves:
            continue
        sources = node.inputs if node.op_type == "Concat" else node.inputs[:1]
        grids = [encodings[s.name] for s in sources if s.name in encodings]
        if len(grids) < len(sources) or any(
            grid.scale.ndim or not grid.equals(grids[0]) for grid in grids
        ):
            continue
        stem = f"{sources[0].name}.{node.op_type.lower()}"
        for output in (value for value in node.outputs if value.name not in encodings):
            if not output.is_graph_output():
                names = (f"{stem}_{number}" if number else stem for number in count())
                output.name = next(name for name in names if name not in taken)
                taken.add(output.name)
            encodings[output.name] = grids[0]


def _encode_rest_(model: Any, encodings: dict[str, Encoding]) -> None:
    """Encodings of bounded functions (their range) and of constants (one step)."""
    for node in model.graph:
        name, source = node.outputs[0].name, node.inputs[0].name if node.inputs else ""
        if node.op_type in _RANGES and name not in encodings and source in encodings:
            low, high = (torch.tensor(end) for end in _RANGES[node.op_type])
            bits = encodings[source].scheme.bitwidth
            encodings[name] = encoding_from_range(low, high, Scheme(bits, symmetric=False))
    floats = require("onnx_ir", "onnx").DataType.FLOAT
    for name, value in model.graph.initializers.items():
        if value.dtype != floats or name in encodings:
            continue
        number = tensor_of(value)
        if number.numel() == 1 and float(number):
            offset = torch.tensor(0 if float(number) > 0 else -1)
            scale = number.abs().reshape(())
            encodings[name] = Encoding(Scheme(16, symmetric=False), scale, offset)


class FloatOnnxModel(OnnxModel):
    """A float model and its encodings as a QDQ model, in ONNX Runtime on the CPU. The tensors in
    `weights`, a safetensors file, replace initializers of the same names."""

    # Without these, ONNX Runtime replaces Q/DQ pairs by integer kernels, which round elsewhere, and
    # quantizes float activations and biases by itself.
    session_options = SESSION_OPTIONS | EIGHT_BIT_OPTIONS

    def __init__(self, model: Path, encodings: Path, weights: Path | None = None):
        super().__init__(model.parent)
        self.model, self.encodings, self.weights = model, encodings, weights

    @cached_property
    def session(self) -> Any:
        return open_model(self.load(), self.session_options)

    @cached_property
    def file(self) -> EncodingsFile:
        return read_encodings(self.encodings)

    @cached_property
    def graph(self) -> Any:
        """The graph of the model's file, unchanged."""
        return load_graph(self.model).graph

    def problems(self) -> list[str]:
        """Contradictions between the two files: entries that name no tensor or are in the wrong
        section; if there are none, parameters that are not on the grid of their entry."""
        # Only what makes a tool compute something else: other damage is found by the digests.
        where, initializers = self.encodings.name, self.graph.initializers
        computed = {output.name for node in self.graph for output in node.outputs}
        computed |= {value.name for value in self.graph.inputs}
        try:
            entries, parameters = self.file.by_name, self.file.parameters
        except EncodingsFileError as error:
            return [f"{where}: {error}"]
        problems = []
        for name in entries:
            if name not in initializers and name not in computed:
                unknown = f"{printable(name)} is not the name of a tensor in {self.model.name}"
                problems.append(f"{where}: {unknown}")
            elif parameters is not None and (name in parameters) != (name in initializers):
                kinds = ("an activation", "a parameter")
                said, kind = kinds[name in parameters], kinds[name in initializers]
                problems.append(f"{where}: {name} is listed as {said}, but is {kind} of the graph")
        if problems:
            return problems
        for name, stored in self.parameters().items():
            file = self.weights if self.weights and name in self.replaced else self.model
            try:
                grid, values = self.grid(name, stored)
                wrong = int((grid.fake_quantize(values) != values).sum())
                problem = f"{wrong} of {values.numel()} values" if wrong else ""
            except (SourceError, GridError) as error:
                problem = str(error)
            if problem:
                problems.append(
                    f"{file.name}: {name} is not on the grid of its entry in {where} ({problem})"
                )
        return problems

    def parameters(self) -> dict[str, Tensor]:
        """The encoded initializers by name; read again in every call."""
        initializers = self._load_float().graph.initializers
        names = [name for name in self.file.by_name if name in self.graph.initializers]
        with foreign_as(ExportError, f"the weights of {str(self.model)!r} cannot be read"):
            return {name: tensor_of(initializers[name]) for name in names}

    def grid(self, name: str, values: Tensor) -> tuple[Encoding, Tensor]:
        """Grid and values of a parameter, both of the tensor as [..., out, in]."""
        readers = self.graph.initializers[name].uses()
        transposed = values.ndim == 2 and any(
            node.op_type == "MatMul" and position == 1 for node, position in readers
        )
        values = values.T if transposed else values
        layout = TensorLayout(tuple(values.shape), transposed, 0, "channel")
        return grid_of(self.file.by_name[name], layout, self.file.version), values

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        stored = {name: value for name, value in self.parameters().items() if name in values}
        computed = {name: value for name, value in values.items() if name not in stored}
        return super().run_layers(computed, tensors) | stored

    @cached_property
    def replaced(self) -> Mapping[str, Any]:
        """The arrays in `weights`."""
        if self.weights is None:
            return {}
        with foreign_as(ExportError, f"{str(self.weights)!r} cannot be read"):
            return load_file(self.weights)

    def _load_float(self) -> Any:
        model = load_graph(self.model)
        for name, array in self.replaced.items():
            value = model.graph.initializers.get(name)
            if value is None or tuple(value.shape) != array.shape:
                raise ExportError(
                    f"{self.weights}: {name} of shape {list(array.shape)} is not a weight of "
                    f"{self.model.name}. Copy the files again"
                )
            value.const_value = require("onnx_ir", "onnx").tensor(array, name=name)
        return model

    def load(self) -> Any:
        """The model with Q/DQ after every tensor with an encoding that is computed."""
        # Parameters get none: `problems` shows that rounding them would change nothing. What is
        # float16 on the device is float32 here.
        model = self._load_float()
        inputs = {value.name for value in model.graph.inputs}
        values = {output.name: output for node in model.graph for output in node.outputs}
        values |= {value.name: value for value in model.graph.inputs}
        for entry in self.file.encodings:
            if entry.name not in values or isinstance(entry, FloatEncoding):
                continue
            name, value = entry.name, values[entry.name]
            encoding = grid_of(entry, TensorLayout((1,)), self.file.version)
            grid = constants(model, name, activation_arrays(name, encoding))
            if name not in inputs:
                value.name = f"{name}.float"
            readers, tensor = [user for user, _ in value.uses()], activation_tensor(name, inputs)
            result = insert_rounding(model, value, tensor, grid, readers, f"{name}.codes")
            for index, output in enumerate(model.graph.outputs):
                if output is value:
                    model.graph.outputs[index] = result
        # QuantizeLinear takes 16 bits from opset 21 on, Microsoft's own at any opset.
        if model.graph.opset_imports[""] < OPSET:
            for node in model.graph:
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    node.domain = "com.microsoft"
            model.graph.opset_imports["com.microsoft"] = 1
        return model
