"""From a captured graph to an `onnx_ir.Model` with markers where encodings belong.

A `QuantizedGraph` lists marks: the values that have an encoding (`simulation/placement.py` chooses
them). Each mark becomes a marker, a `qwlora::quantized` node, in a copy of the captured program.
`torch.onnx.export` passes these markers and the `qwlora::dequantize` nodes of packed weights
through as custom operators, keeps torch's names, and optimizes nothing. `onnx_model.py` rewrites
both into standard ONNX.

`torch.onnx.export` is by far the slowest step of an export, and depends on no tensor's values. So
the last translations are kept without tensors: adapters of one structure are translated once.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.errors import ExportError
from qwlora.graph.quantized_graph import QuantizedGraph, insert_after, with_graph
from qwlora.nn.custom_ops import NAMESPACE
from qwlora.system.optional_packages import require

MARKER, DEQUANTIZE = "Quantized", "Dequantize"
TRANSLATIONS_KEPT = 8
_translations_by_structure: dict[str, Any] = {}  # without tensors; the last one was used last


def marked_program(graph: QuantizedGraph) -> ExportedProgram:
    """A copy of the program in which every mark is a node; tensors are shared."""
    copied = copy.deepcopy(graph.program.graph)
    nodes = {node.name: node for node in copied.nodes}
    last_input = [node for node in copied.nodes if node.op == "placeholder"][-1]
    for mark in reversed(graph.marks):
        node = nodes[mark.node]
        insert_after(
            node,
            partial(_marker, name=mark.name),
            place=last_input if node.op == "placeholder" else node,
        )
    return with_graph(graph.program, copied)


def _marker(node: Node, name: str) -> Node:
    return node.graph.call_function(torch.ops.qwlora.quantized.default, (node, name))


def to_onnx(graph: QuantizedGraph, opset: int) -> Any:
    """The `onnx_ir.Model` of `graph`, markers included.

    Raises:
        ExportError: torch.onnx cannot translate an operator.
        MissingExtraError: the `onnx` extra is not installed.
    """
    ir = require("onnx_ir", "onnx")
    program = marked_program(graph)
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
    """Tensors of the program by the names of their initializers; ONNX has complex ones as pairs."""
    for name, tensor in {**program.state_dict, **program.constants}.items():
        if isinstance(tensor, Tensor):
            yield name, torch.view_as_real(tensor) if tensor.is_complex() else tensor.detach()


def _translate(program: ExportedProgram, graph: QuantizedGraph, opset: int) -> Any:
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own deprecations here
            exported = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=_translations(),
                opset_version=opset,
                optimize=False,
                verbose=False,
                input_names=list(graph.inputs),
                output_names=list(graph.interface.outputs),
            )
    except Exception as error:  # torch.onnx raises several private classes
        raise ExportError(f"torch.onnx cannot translate the graph: {error}") from error
    if exported is None:
        raise ExportError("torch.onnx returned no program")
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(exported.model)  # stack traces, with paths of this machine
    return exported.model


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Our two torch operators as custom ONNX operators, which are rewritten later."""
    from onnx.defs import OpSchema
    from onnxscript import values

    opset = values.Opset(NAMESPACE, 1)
    attribute = OpSchema.Attribute(
        "name", OpSchema.AttrType.STRING, "the encoding's name", required=True
    )
    marker = OpSchema(
        MARKER, NAMESPACE, 1, inputs=[_formal("x")], outputs=[_formal("y")], attributes=[attribute]
    )
    unpacker = OpSchema(
        DEQUANTIZE,
        NAMESPACE,
        1,
        inputs=[_formal("packed", "tensor(uint8)")],
        outputs=[_formal("y")],
    )
    marker_op, unpacker_op = (
        values.Op(opset, MARKER, marker),
        values.Op(opset, DEQUANTIZE, unpacker),
    )

    def translate_quantized(x: Any, name: str) -> Any:
        return marker_op(x, name=name)

    def translate_dequantize(
        packed: Any,
        scale: Any,
        block_scale: Any,
        zero_point: Any,
        minimum: Any,
        count: int,
        layout: str,
    ) -> Any:
        return unpacker_op(packed)  # scales and offsets are written from the weight's encoding

    return {
        torch.ops.qwlora.quantized.default: translate_quantized,
        torch.ops.qwlora.dequantize.default: translate_dequantize,
    }


def _formal(name: str, kind: str = "tensor(float)") -> Any:
    from onnx.defs import OpSchema

    return OpSchema.FormalParameter(name, kind)
