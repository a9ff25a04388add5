"""Write an ONNX model: markers become QuantizeLinear and DequantizeLinear, weights become integers.

    activation `n`    QuantizeLinear -> `n.codes` -> DequantizeLinear -> `n`
    input `n`         the same, but the result is `n.dequantized`: the input itself is called `n`
    weight `n`        initializer `n.codes` -> DequantizeLinear -> `n`
    float offsets     initializer `n.codes` -> DequantizeLinear without zero point -> `n.scaled`
                      -> Add `n.minimum`, per block -> `n`

Codes are int4, int8 or int16, unsigned if the grid is asymmetric. The name of an encoding is the
name of its tensor. The weight of a Linear layer is stored [in, out], as its MatMul takes it.

A `QuantizedGraph` lists marks: the values that have an encoding (`simulation/placement.py` chooses
them). Each mark becomes a marker, a `qwlora::quantized` node, in a copy of the captured program.
`torch.onnx.export` passes these markers and the `qwlora::dequantize` nodes of packed weights
through as custom operators, keeps torch's names, and optimizes nothing. Then both are rewritten.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import ExportError, foreign_as
from qwlora.graph.capture import MASK
from qwlora.graph.quantized_graph import Kind, QuantizedGraph, insert_after, with_graph
from qwlora.grid.encoding import Encoding, aligned
from qwlora.grid.packing import unpack
from qwlora.grid.scheme import Blocks, PerChannel, PerTensor
from qwlora.nn.custom_ops import NAMESPACE
from qwlora.nn.packed_tensor import narrowest
from qwlora.nn.temporary import replaced
from qwlora.simulation.kv_cache_graph import capture_cached
from qwlora.simulation.placement import place
from qwlora.simulation.placement_rules import Schemes
from qwlora.system.optional_packages import require
from qwlora.system.quiet import OF_EXPORT, quiet
from qwlora.targets.onnx.runtime_operators import (
    ATTENTION,
    DOMAIN,
    RuntimeGraph,
    translations,
    with_runtime_operators,
)

MODEL_FILE, DATA_FILE = "model.onnx", "model.onnx.data"
_LEAST_NARROWED = 2**14  # numbers of a matrix; others would save nothing worth a node
_READERS = {"Gather", "Gemm", "MatMul", "Transpose"}  # of embeddings and weights, not of scales
MARKER, DEQUANTIZE = "Quantized", "Dequantize"
TRANSLATIONS_KEPT = 8
_aten = torch.ops.aten
# `torch.onnx.export` is the slowest step of an export: 26 s for SmolLM2 with 661 markers
# (docs/log/runtimes.md). It depends on no tensor's values, so adapters of one structure share a
# translation without tensors. The last one was used last.
_translations_by_structure: dict[str, Any] = {}
OPSET = 21  # the first with int4, 16-bit and blocked DequantizeLinear
OF_INPUT = ".dequantized"  # of a quantized input's name: its value on its grid


def build_model(
    graph: QuantizedGraph, metadata: Mapping[str, str], opset: int = OPSET
) -> tuple[Any, set[str]]:
    """The `onnx_ir.Model` of a graph, and names of the weights that are stored [in, out].

    Raises:
        ExportError: an operator has no translation, or activations have other than 8 or 16 bits.
    """
    model = to_onnx(graph, opset)
    rewriter = _Rewriter(model, {mark.name for mark in graph.marks if mark.kind is Kind.PARAMETER})
    rewrite_markers(model, graph, rewriter.activation, rewriter.weight)
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.shape = require("onnx_ir", "onnx").Shape(graph.interface.shapes[value.name])
    for output in (output for node in model.graph for output in node.outputs):
        if not output.is_graph_output():
            output.shape = None  # torch's private symbols; runtimes infer their own
    model.producer_name = "qwlora"
    model.metadata_props.update(metadata)
    return model, rewriter.transposed


def to_onnx(graph: QuantizedGraph, opset: int) -> Any:
    """The `onnx_ir.Model` of `graph`, markers included."""
    ir = require("onnx_ir", "onnx")
    program = _marked_program(graph)
    key = _structure(program, graph, opset)
    translation = _translations_by_structure.pop(key, None)
    if translation is None:
        translation = _translate(program, graph, opset)
        for name, _ in _tensors(program):
            if name in translation.graph.initializers:
                translation.graph.initializers[name].const_value = None
    _translations_by_structure[key] = translation
    while len(_translations_by_structure) > TRANSLATIONS_KEPT:
        del _translations_by_structure[next(iter(_translations_by_structure))]
    model = translation.clone()
    for name, tensor in _tensors(program):
        if name in model.graph.initializers:
            model.graph.initializers[name].const_value = ir.tensor(tensor, name=name)
    return model


def _marked_program(graph: QuantizedGraph) -> ExportedProgram:
    """A copy of the program, with shared tensors, in which every mark and output is a node."""
    copied = copy.deepcopy(graph.program.graph)
    nodes = {node.name: node for node in copied.nodes}
    last_input = [node for node in copied.nodes if node.op == "placeholder"][-1]
    # Markers of inputs all go directly after the last input, so the last one has to come first.
    for mark in reversed(graph.marks):
        node = nodes[mark.node]
        before = last_input if node.op == "placeholder" else node
        insert_after(node, partial(_marker, mark.name), before)
    output, results = copied.output_node(), list[Node]()
    with copied.inserting_before(output):
        # A value has one name in ONNX: one that is also an input, or is returned twice, needs more.
        for node in output.args[0]:
            is_own = node.op != "placeholder" and node not in results
            results.append(node if is_own else copied.call_function(_aten.clone.default, (node,)))
            results[-1].meta = dict(node.meta)
    output.args = (tuple(results),)
    return with_graph(graph.program, copied)


def _marker(name: str, node: Node) -> Node:
    return node.graph.call_function(torch.ops.qwlora.quantized.default, (node, name))


def _structure(program: ExportedProgram, graph: QuantizedGraph, opset: int) -> str:
    """A digest of everything that a translation depends on, which excludes values of tensors."""
    digest = hashlib.sha256(repr((opset, graph.interface)).encode())
    digest.update(f"{program.graph_signature} {program.range_constraints}".encode())
    for node in program.graph.nodes:
        value = node.meta.get("val")
        form = (value.dtype, tuple(value.shape)) if isinstance(value, Tensor) else value
        origin = node.meta.get("nn_module_stack"), node.meta.get("stack_trace")
        digest.update(f"{node.format_node()} {form} {origin}\n".encode())
    return digest.hexdigest()


def _tensors(program: ExportedProgram) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the program by the names of their initializers."""
    for name, tensor in {**program.state_dict, **program.constants}.items():
        # Operators of ONNX take no complex numbers: torch.onnx computes with pairs of real ones.
        if isinstance(tensor, Tensor):
            yield name, torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()


def _translate(program: ExportedProgram, graph: QuantizedGraph, opset: int) -> Any:
    require("onnx", "onnx")
    try:
        with warnings.catch_warnings(), quiet(OF_EXPORT), _decomposing_if_needed():
            warnings.simplefilter("ignore")  # torch warns about its own deprecations here
            exported = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=_translations(),
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=list(graph.interface.inputs),
                output_names=list(graph.interface.outputs),
            )
    except Exception as error:  # torch.onnx raises several private classes
        raise ExportError(f"torch.onnx cannot translate the graph: {error}") from error
    assert exported is not None
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(exported.model)  # stack traces, with paths of this machine
    _remove_zero_biases_(exported.model)
    named = {*graph.interface.inputs, *graph.interface.outputs}
    for value in (output for node in exported.model.graph for output in node.outputs):
        if value.name in named and not value.is_graph_output():  # the operator is called alike
            value.name = f"{value.name}.computed"
    return exported.model


@contextmanager
def _decomposing_if_needed() -> Iterator[None]:
    """Let torch.onnx decompose only programs with operators that it has no translation of."""
    # It traces every program again to decompose it, which is nine tenths of its time (torch 2.13).
    try:
        from torch.onnx._internal.exporter import _fx_passes as passes

        original = passes.decompose_with_registry
    except (ImportError, AttributeError):  # another torch: only slower
        yield
        return

    def decompose(program: ExportedProgram, registry: Any) -> ExportedProgram:
        known = {of_target[0].fx_target for of_target in registry.functions.values()}
        called = {n.target for n in program.graph.nodes if n.op == "call_function"}
        return original(program, registry) if called - known else program

    with replaced(passes, decompose, "decompose_with_registry"):
        yield


def _remove_zero_biases_(model: Any) -> None:
    # torch.onnx (2.13) gives a convolution without a bias one of zeros, which it computes from the
    # shape of the weight. A bias that a model computes in the same way must stay.
    constant_of = require("onnx_ir", "onnx").convenience.get_const_tensor
    for node in model.graph:
        if node.op_type.startswith("Conv") and len(node.inputs) == 3:
            value = node.inputs[2]
            while value.producer() and value.producer().op_type in ("Expand", "CastLike", "Cast"):
                value = value.producer().inputs[0]
            number = None if value is node.inputs[2] else constant_of(value)
            if number is not None and not number.numpy().any():
                node.resize_inputs(2)


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    ir, op = require("onnx_ir", "onnx"), require("onnxscript", "onnx").opset21

    def our_node(x: Any, operator: str) -> Any:
        # onnxscript makes standard operators only, so one of them is renamed.
        value = op.Identity(x)
        value.producer().domain, value.producer().op_type = NAMESPACE, operator
        return value

    def translate_quantized(x: Any, name: str) -> Any:
        value = our_node(x, MARKER)
        value.producer().attributes["name"] = ir.AttrString("name", name)
        return value

    def translate_dequantize(
        packed: Any,
        scale: Any,
        block_scale: Any,
        zero_point: Any,
        minimum: Any,
        count: int,
        layout: str,
    ) -> Any:
        return our_node(packed, DEQUANTIZE)  # its grid is written from the weight's encoding

    def translate_and(x: Any, y: Any) -> Any:
        return op.And(x, y) if x.dtype == ir.DataType.BOOL else op.BitwiseAnd(x, y)

    def translate_to(x: Any, dtype: int, *copies: Any, **more: Any) -> Any:
        return op.Cast(x, to=dtype)

    return {
        # In masks and angles. torch.onnx has no translation of these: see `_decomposing_if_needed`.
        _aten.__and__.Tensor: translate_and,
        _aten.to.dtype: translate_to,
        _aten.to.device: lambda x, device, *others, **more: translate_to(x, *others, **more),
        torch.ops.qwlora.quantized.default: translate_quantized,
        torch.ops.qwlora.dequantize.default: translate_dequantize,
        **translations(),
    }


Rewrite = Callable[[Any, str, Encoding], None]


def rewrite_markers(
    model: Any, graph: QuantizedGraph, activation: Rewrite, weight: Rewrite
) -> None:
    """Call `activation` or `weight` with each marker, its name and encoding; they replace it."""
    kinds = {mark.name: mark.kind for mark in graph.marks}
    for node in [n for n in model.graph if n.domain == NAMESPACE and n.op_type == MARKER]:
        name = node.attributes["name"].value
        rewrite = activation if kinds[name] is Kind.ACTIVATION else weight
        rewrite(node, name, graph.encodings[name])
    remove_unused(model)
    model.graph.opset_imports.pop(NAMESPACE, None)


class _Rewriter:
    """Replaces markers. `parameters` are weights that are no operands of a matrix product."""

    def __init__(self, model: Any, parameters: set[str]):
        self.model, self.parameters = model, parameters
        self.transposed: set[str] = set()
        self.inputs = {value.name for value in model.graph.inputs}
        # By tensor of the model and whether it is transposed: tied weights share initializers.
        self.initializers: dict[tuple[int, bool], list[Any]] = {}

    def activation(self, node: Any, name: str, encoding: Encoding) -> None:
        grid = constants(self.model, name, activation_arrays(name, encoding))
        tensor, source = activation_tensor(name, self.inputs), node.inputs[0]
        value = insert_rounding(self.model, source, tensor, grid, [node], f"{name}.codes")
        replace_marker(self.model, node, value)

    def weight(self, node: Any, name: str, encoding: Encoding) -> None:
        source, readers = node.inputs[0], [user for user, _ in node.outputs[0].uses()]
        is_operand = bool(readers) and name not in self.parameters
        # Stored [in, out], ONNX Runtime 1.32 fuses the product into MatMulNBits. Stored [out, in],
        # it dequantizes the weight in every call (docs/log/runtimes.md).
        transposed = is_operand and all(map(is_matrix_transpose, readers))
        key = (id(source), transposed)
        if key not in self.initializers:
            arrays = weight_arrays(codes_of(source, encoding), encoding, transposed)
            self.initializers[key] = constants(self.model, name, arrays)
        shape = tuple(source.shape)
        axis = _axis_attributes(encoding, transposed, len(shape))
        nodes = [new_node("DequantizeLinear", self.initializers[key], name, axis)]
        if encoding.scheme.float_offset:
            nodes[0].outputs[0].name = f"{name}.scaled"
            nodes += self._add_minimum(nodes[0].outputs[0], name, encoding, transposed, shape)
        value, old = nodes[-1].outputs[0], node.outputs[0]
        value.name, value.type, value.shape = name, old.type, old.shape
        self.model.graph.insert_before(node, nodes)
        replace_marker(self.model, node, value)
        if transposed:
            self.transposed.add(name)
            for user in readers:
                user.outputs[0].replace_all_uses_with(value)
                self.model.graph.remove(user, safe=True)

    def _add_minimum(
        self, scaled: Any, name: str, encoding: Encoding, transposed: bool, shape: tuple[int, ...]
    ) -> list[Any]:
        # DequantizeLinear has integer zero points only, and Add does not know blocks: these become
        # an axis of their own while their minimum is added.
        granularity = encoding.scheme.granularity
        minimum = aligned(encoding.minimum, granularity, len(shape))
        if not isinstance(granularity, Blocks):
            minimum = minimum.mT if transposed and minimum.ndim else minimum
            steps = [("Add", "minimum", minimum.contiguous().numpy())]
        else:
            (rows, columns), size = shape, granularity.size
            split, whole = [rows, columns // size, size], [rows, columns]
            if transposed:
                minimum, split, whole = minimum.permute(1, 2, 0), [*split[1:], rows], whole[::-1]
            steps = [
                ("Reshape", "blocks", np.array(split)),
                ("Add", "minimum", minimum.contiguous().numpy()),
                ("Reshape", "whole", np.array(whole)),
            ]
        nodes = list[Any]()
        for operator, part, array in steps:
            operand = constant(self.model, f"{name}.{part}", array)
            nodes.append(new_node(operator, [scaled, operand], f"{name}.{part}.{operator.lower()}"))
            scaled = nodes[-1].outputs[0]
        return nodes


def replace_marker(model: Any, node: Any, value: Any) -> None:
    """Replace a marker by `value`. A graph output keeps its own name, after an Identity."""
    old = node.outputs[0]
    for user, index in old.uses():
        user.replace_input_with(index, value)
    if old.is_graph_output():
        identity = new_node("Identity", [value], f"{value.name}.output")
        model.graph.insert_before(node, identity)
        replace_value(old, identity.outputs[0])
    model.graph.remove(node, safe=True)


def activation_arrays(name: str, encoding: Encoding) -> dict[str, np.ndarray[Any, Any]]:
    """Scale and zero point of an activation as its QuantizeLinear takes them."""
    bits = encoding.scheme.bitwidth
    if bits not in (8, 16):
        raise ExportError(
            f"{name}: ONNX has no {bits}-bit QuantizeLinear for activations; use 8 or 16 bits"
        )
    return {
        "scale": encoding.scale.cpu().numpy(),
        "zero_point": (-encoding.offset).cpu().numpy().astype(f"uint{bits}"),
    }


def weight_arrays(
    codes: torch.Tensor, encoding: Encoding, transposed: bool
) -> dict[str, np.ndarray[Any, Any]]:
    """Codes, scale and, if asymmetric, zero point of a weight as its DequantizeLinear takes them.

    Args:
        codes: [out, in].
        transposed: the arrays are [in, out].
    """
    import ml_dtypes

    # Our codes count from the lower end of the grid, those of ONNX's signed types from zero.
    turn = (lambda t: t.T) if transposed else (lambda t: t)
    scale = encoding.scale if encoding.scale.ndim < 2 else turn(encoding.scale)
    bits, signed = encoding.scheme.bitwidth, encoding.scheme.symmetric
    shift, wide = encoding.scheme.symmetric_offset if signed else 0, 8 if bits <= 8 else 16
    kind = np.dtype(f"{'int' if signed else 'uint'}{wide}")
    if bits <= 4:
        kind = np.dtype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
    whole = (turn(codes).to(torch.int32) + shift).contiguous()
    arrays = {"codes": whole.cpu().numpy().astype(kind), "scale": scale.contiguous().cpu().numpy()}
    if not (signed or encoding.scheme.float_offset):
        offset = encoding.offset if encoding.offset.ndim < 2 else turn(encoding.offset)
        arrays["zero_point"] = (-offset).contiguous().cpu().numpy().astype(kind)
    return arrays


def activation_tensor(name: str, inputs: Collection[str]) -> str:
    """The tensor that has the quantized value of the encoding `name`."""
    return f"{name}{OF_INPUT}" if name in inputs else name


def codes_of(value: Any, encoding: Encoding) -> torch.Tensor:
    """Codes of a weight: those of a packed layer, or of an adapter's float weight, rounded."""
    producer = value.producer()
    if producer is not None and producer.domain == NAMESPACE and producer.op_type == DEQUANTIZE:
        return unpack(tensor_of(producer.inputs[0]), encoding.scheme.bitwidth, value.shape[-1])
    return encoding.quantize(tensor_of(value))


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


def base_graph(model: PreTrainedModel, longest: int | None = None) -> Any:
    """The `onnx_ir.Model` of a base, with DequantizeLinear nodes for its integers.

    Args:
        longest: number of positions that the model knows. If given, operators of ONNX Runtime
            compute attentions and norms (`runtime_operators.py`), where they can.

    Raises:
        ExportError: an operator has no translation.
        CaptureError: the model has no graph with a cache.
    """
    captured = capture_cached(model)
    placed = place(captured.program, Schemes(policy="weights-only"), captured.input_names)
    marks = tuple(mark for mark in placed.marks if mark.kind is Kind.BASE)
    encodings = placed.base_encodings(model)
    runtime = None if longest is None else with_runtime_operators(captured, longest)
    program = captured.program if runtime is None else runtime.program
    result = build_model(QuantizedGraph(program, captured.interface, marks, encodings), {})[0]
    if runtime is not None:
        complete_attentions_(result, runtime)
    return result


def complete_attentions_(model: Any, runtime: RuntimeGraph) -> None:
    """Give the attentions of a written graph their attributes, lengths and tables."""
    ir = require("onnx_ir", "onnx")
    mask = next(value for value in model.graph.inputs if value.name == MASK)
    axis, one = constant(model, "axis", np.array([1])), constant(model, "one", np.int32(1))
    rows = new_node("Cast", [mask], "mask.integers", {"to": int(ir.DataType.INT32)})
    count = new_node("ReduceSum", [rows.outputs[0], axis], "row_lengths", {"keepdims": 0})
    lengths = new_node("Sub", [count.outputs[0], one], "seqlens_k")
    total = new_node("ReduceMax", [count.outputs[0]], "total_sequence_length", {"keepdims": 0})
    model.graph.insert_before(model.graph[0], [rows, count, lengths, total])
    tables = {
        key: constant(model, f"angles.{index}", table.numpy())
        for index, (key, table) in enumerate(runtime.tables.items())
    }
    for node in [node for node in model.graph if node.op_type == ATTENTION]:
        attention = runtime.attentions[node.attributes.pop("name").value]
        for attribute in ir.convenience.convert_attributes(attention.attributes):
            node.attributes[attribute.name] = attribute
        inputs = [lengths.outputs[0], total.outputs[0], *(tables[key] for key in attention.tables)]
        first = len(node.inputs)
        node.resize_inputs(first + len(inputs))
        for index, value in enumerate(inputs, start=first):
            node.replace_input_with(index, value)
    model.graph.opset_imports[DOMAIN] = 1


def matrix_products(graph: Any, modules: Collection[str]) -> Iterator[tuple[Any, str]]:
    """Nodes that multiply with the weight of a module, and the path of the module."""
    return _readers(graph, ("MatMul", "Gemm"), 1, modules)


def gathers(graph: Any, modules: Collection[str]) -> Iterator[tuple[Any, str]]:
    """Nodes that read rows of the weight of a module, and the path of the module."""
    return _readers(graph, ("Gather",), 0, modules)


def _readers(
    graph: Any, operators: Collection[str], index: int, modules: Collection[str]
) -> Iterator[tuple[Any, str]]:
    for node in graph.graph:
        if node.op_type in operators:
            value = node.inputs[index]
            # a weight may be transposed, after a view of the same shape
            while (origin := value.producer()) and origin.op_type in ("Transpose", "Reshape"):
                value = origin.inputs[0]
            path, is_weight, _ = str(value.name).rpartition(".weight")
            names = path, path.removeprefix("model.")  # floats have the captured name
            if is_weight and (known := [name for name in names if name in modules]):
                yield node, known[0]


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by path, packed or not."""
    return {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def load_graph(path: Path) -> Any:
    """The `onnx_ir.Model` in a file."""
    with foreign_as(ExportError, f"{str(path)!r} is not an ONNX model"):
        return require("onnx_ir", "onnx").load(path)


def save_graph(model: Any, path: Path, data: str | None = DATA_FILE, smallest: int = 256) -> None:
    """Write a model, with tensors of `smallest` bytes and more in the file `data`, if any."""
    require("onnx_ir", "onnx").save(model, path, external_data=data, size_threshold_bytes=smallest)


def store_narrow(model: Any, bits: int) -> None:
    """Store embeddings and matrices of products that are floats in 16 bits where that is exact;
    `bits` of 32 change nothing."""
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
        # torch makes no NumPy array of bfloat16, so its bits go through int16.
        kind = np.float16 if narrow.dtype == torch.float16 else ml_dtypes.bfloat16
        stored, cast = constant(model, name, narrow.view(torch.int16).numpy().view(kind)), None
        to = {"to": int(ir.DataType.FLOAT)}
        for node, index in uses:
            # The rows are cast, not the table, so that a runtime keeps it as it is stored.
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
            # ONNX Runtime folds this cast when it loads the model, as the transpose of a head.
            if cast is None:
                cast = new_node("Cast", [stored], f"{name}.wide", to)
                model.graph.insert_before(model.graph[0], cast)
            node.replace_input_with(index, cast.outputs[0])


def numbers(value: Any) -> np.ndarray[Any, Any]:
    """The array of an initializer."""
    return value.const_value.numpy()


def tensor_of(value: Any) -> torch.Tensor:
    """A copy of an initializer's values."""
    # torch warns of arrays that it cannot write to, such as those of a mapped file.
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
    """Let everything that reads `old` read `new`, which gets the name of an output of the graph."""
    new.type, new.shape = old.type, old.shape
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.before", old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def insert_rounding(
    model: Any, value: Any, name: str, grid: Sequence[Any], users: Sequence[Any], codes: str = ""
) -> Any:
    """Quantize and dequantize a value after its producer, for some of its users.

    Args:
        name: of the result; `codes` is that of its codes. Default: `name.codes`.
        grid: values of scale and zero point.
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
        shape: with names for axes of any size.
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
    # In ONNX, an input that is also an initializer has that as its default.
    model.graph.register_initializer(value)
    model.graph.inputs.append(value)
    return value


def write_adapter_file(values: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Write an adapter file of ONNX Runtime: values of inputs that have a default, by name."""
    runtime = require("onnxruntime", "onnx")
    written = runtime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    to_value = runtime.OrtValue.ortvalue_from_numpy
    written.set_parameters({name: to_value(array) for name, array in values.items()})
    written.export_adapter(str(path))
