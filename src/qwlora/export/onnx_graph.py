"""From a captured graph to an `onnx_ir.Model` with markers where encodings belong.

A `QuantizedGraph` lists marks: the values that have an encoding (`simulation/placement.py` chooses
them). Each mark becomes a marker, a `qwlora::quantized` node, in a copy of the captured program.
`torch.onnx.export` passes these markers and the `qwlora::dequantize` nodes of packed weights
through as custom operators, keeps torch's names, and optimizes nothing. `onnx_model.py` rewrites
both into standard ONNX.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.errors import ExportError
from qwlora.graph.quantized_graph import QuantizedGraph, insert_after, with_graph
from qwlora.nn.custom_ops import NAMESPACE
from qwlora.system.optional_packages import require

MARKER, DEQUANTIZE = "Quantized", "Dequantize"


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
    require("onnx", "onnx")
    require("onnxscript", "onnx")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own deprecations here
            exported = torch.onnx.export(
                marked_program(graph),
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
