"""The graph of targets genai and web: operators on integers, and places for adapters.

Every linear layer has the branch of `adapter_branches.py`. Its factors are inputs with a default of
rank 0, so that a session without an adapter computes the base. Ranks may differ between layers and
adapters.

Weights are the base's integers, as operands of ONNX Runtime's MatMulNBits and GatherBlockQuantized,
which have 2, 4 and 8 bits. Others are stored in the next wider ones, with their own zero point. One
MatMulNBits computes all products of the same value whose grids agree, such as q, k and v.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from qwlora.errors import QwloraWarning
from qwlora.grid.encoding import spread
from qwlora.grid.packing import pack_words
from qwlora.nn.packed_layer import PackedLayer
from qwlora.system.optional_packages import require
from qwlora.targets.adapter_branches import factor_shapes, zero_adapter
from qwlora.targets.onnx.onnx_model import (
    add_input,
    base_graph,
    constant,
    constants,
    gathers,
    linear_modules,
    matrix_products,
    new_node,
    numbers,
    remove_unused,
    replace_value,
    store_narrow,
)
from qwlora.targets.onnx.runtime_operators import ATTENTION, DOMAIN
from qwlora.targets.registry import NBITS
from qwlora.targets.target import ExportedBase
from qwlora.targets.weights.weights_folder import check_layers

# Accuracy levels of MatMulNBits: activations as float32, so that a file computes what was trained,
# or rounded to 8 bits, the default of onnxruntime-genai's own builder.
EXACT, FAST = 1, 4
_OURS = {"MatMulNBits", "GatherBlockQuantized"}
_FLOATS = "floats"


def switchable_graph(exported: ExportedBase) -> Any:
    """The graph of a base, with MatMulNBits and places for adapters; see the module."""
    text: Any = exported.model.config.get_text_config()
    graph = base_graph(exported.model, getattr(text, "max_position_embeddings", None))
    if all(node.op_type != ATTENTION for node in graph.graph):
        message = (
            f"genai and web: ONNX Runtime has no operator for the attention of {text.model_type}, "
            "so the graph has many small ones and generates text more slowly"
        )
        warnings.warn(message, QwloraWarning, stacklevel=2)
    # First: `matrix_products` does not find MatMulNBits nodes.
    add_branches_(graph, exported.model)
    write_integers_(graph, exported.model)
    store_narrow(graph, exported.embedding_bits)
    return graph


def add_branches_(graph: Any, model: PreTrainedModel) -> None:
    """Add the places for adapters to the graph of a base; see the module."""
    linears = linear_modules(model)
    for node, path in list(matrix_products(graph, linears)):
        layer = linears[path]
        if isinstance(layer, nn.Linear):
            rows, columns = layer.out_features, layer.in_features
        else:  # transformers' Conv1D, whose weight is [in, out]
            columns, rows = layer.get_parameter("weight").shape
        shapes = factor_shapes(path, columns, rows)
        # A name of its own for each rank: layers of an adapter may have different ones.
        a, b = (
            add_input(graph, name, none, [size or f"rank:{path}" for size in shapes[name]])
            for name, none in zero_adapter(shapes).items()
        )
        inner = new_node("MatMul", [node.inputs[0], a], f"{path}.inner")
        outer = new_node("MatMul", [inner.outputs[0], b], f"{path}.update")
        total = new_node("Add", [node.outputs[0], outer.outputs[0]], f"{path}.adapted")
        replace_value(node.outputs[0], total.outputs[0])
        total.replace_input_with(0, node.outputs[0])
        graph.graph.insert_after(node, [inner, outer, total])


def write_integers_(graph: Any, model: PreTrainedModel) -> None:
    """Let operators of ONNX Runtime read the codes of packed layers in the graph of a base."""
    layers = {path: m for path, m in model.named_modules() if isinstance(m, PackedLayer)}
    readers = list(matrix_products(graph, layers))
    check_layers("genai", {path: layers[path] for _, path in readers})
    for node, path in gathers(graph, layers):
        scheme, columns = layers[path].scheme, layers[path].count
        # The operator has no float offsets. Such a table is unpacked as a whole.
        if not scheme.float_offset and NBITS.stored_block(scheme, columns) is not None:
            readers.append((node, path))
    known = dict[tuple[int, ...], list[Any]]()  # tied layers share them
    for group in _same_input(readers, layers):
        (node, path), *others = group
        name = "+".join([path, *(other.rpartition(".")[2] for _, other in others)])
        key = tuple(id(layers[member].tensor.parts.packed) for _, member in group)
        if key not in known:
            parts = [operands(layers[member]) for _, member in group]
            rows = {part: np.concatenate([each[part] for each in parts]) for part in parts[0]}
            known[key] = constants(graph, name, rows)
        add, bits = partial(_added, graph, node, name), container_bits(layers[path].scheme.bitwidth)
        if node.op_type == "Gather":
            value = _rows(add, node.inputs[1], known[key], bits)
        elif bits == 8:
            value = _float_product(add, node.inputs[0], known[key])
        else:
            value = _product(add, node.inputs[0], known[key], bits, EXACT)
        counts = [layers[member].tensor.shape[0] for _, member in group]
        values = _split(graph, node, name, value, counts) if others else [value]
        for (node, path), value in zip(group, values, strict=True):
            if node.op_type == "Gemm" and len(node.inputs) > 2:
                value = _added(graph, node, path, "Add", [value, node.inputs[2]], "sum")
            replace_value(node.outputs[0], value)
    graph.graph.opset_imports[DOMAIN] = 1
    remove_unused(graph)


def _same_input(
    readers: Sequence[tuple[Any, str]], layers: Mapping[str, PackedLayer]
) -> list[list[tuple[Any, str]]]:
    """Products of the same value, such as q, k and v, whose integers fit into one operand."""
    groups = dict[Any, list[tuple[Any, str]]]()
    for node, path in readers:
        scheme, columns = layers[path].scheme, layers[path].tensor.shape[1]
        key: Any = path
        if node.op_type != "Gather":
            key = id(node.inputs[0]), scheme.bitwidth, scheme.symmetric, scheme.float_offset
            key += (NBITS.stored_block(scheme, columns),)
        groups.setdefault(key, []).append((node, path))
    return [*groups.values()]


def _split(graph: Any, before: Any, name: str, value: Any, counts: Sequence[int]) -> Sequence[Any]:
    """The values of several layers in one."""
    sizes, ir = constant(graph, f"{name}.rows", np.array(counts)), require("onnx_ir", "onnx")
    node = ir.node("Split", [value, sizes], {"axis": -1}, num_outputs=len(counts), name=name)
    for index, output in enumerate(node.outputs):
        output.name = f"{name}.{index}"
    graph.graph.insert_before(before, node)
    return node.outputs


def fast_(graph: Any) -> None:
    """Let the products of packed layers round activations to 8 bits."""
    for node in list(graph.graph):
        add = partial(_added, graph, node, node.name.removesuffix(".output"))
        if node.op_type == "MatMulNBits":
            weight, bits = node.inputs[1:], node.attributes["bits"].value
        elif node.op_type == "MatMul" and node.inputs[1].name.endswith(_FLOATS):
            values = node.inputs[1].producer().inputs[0].producer().inputs[0].producer()
            steps, scale = values.inputs
            zeros = _origin(steps.producer().inputs[1])
            weight, bits = [_origin(steps), _origin(scale)], 8
            weight += [zeros] if zeros.shape else []
        else:
            continue
        replace_value(node.outputs[0], _product(add, node.inputs[0], weight, bits, FAST))
    remove_unused(graph)


def _added(
    graph: Any, before: Any, path: str, operator: str, inputs: Sequence[Any], part: str, **more: Any
) -> Any:
    """The output of a new node of a layer. NumPy arrays become initializers."""
    values = [
        constant(graph, f"{path}.{part}.{index}", value) if isinstance(value, np.ndarray) else value
        for index, value in enumerate(inputs)
    ]
    domain = DOMAIN if operator in _OURS else ""
    node = new_node(operator, values, f"{path}.{part}", more, domain)
    graph.graph.insert_before(before, node)
    return node.outputs[0]


def _product(add: Any, x: Any, weight: Sequence[Any], bits: int, level: int) -> Any:
    rows, blocks, width = weight[0].shape
    block = 8 * width // bits
    sizes = {"K": blocks * block, "N": rows, "bits": bits, "block_size": block}
    return add("MatMulNBits", [x, *weight], "output", **sizes, accuracy_level=level)


def _float_product(add: Any, x: Any, weight: Sequence[Any]) -> Any:
    """x W^T of codes of 8 bits, which ONNX Runtime unpacks when it loads the model."""
    # With float32 activations, MatMulNBits of 8 bits takes 160 ms for a token in the output head of
    # SmolLM2, and MatMul 6 ms (onnxruntime 1.32).
    (codes, scale, *zeros), last = weight, np.array([-1])
    to = {"to": int(require("onnx_ir", "onnx").DataType.FLOAT)}
    zero = np.array(128, np.float32)
    if zeros:
        zero = add("Unsqueeze", [add("Cast", zeros, "zeros", **to), last], "zeros_by_block")
    steps = add("Sub", [add("Cast", [codes], "codes_as_floats", **to), zero], "steps")
    values = add("Mul", [steps, add("Unsqueeze", [scale, last], "scale_by_block")], "values")
    matrix = add("Reshape", [values, np.array([codes.shape[0], -1])], "matrix")
    return add("MatMul", [x, add("Transpose", [matrix], _FLOATS, perm=[1, 0])], "output")


def _rows(add: Any, ids: Any, weight: Sequence[Any], bits: int) -> Any:
    rows, _, width = weight[0].shape
    codes = add("Reshape", [weight[0], np.array([rows, -1])], "rows")
    settings = {"bits": bits, "block_size": 8 * width // bits, "quantize_axis": 1}
    scale, *zeros = weight[1:]
    return add("GatherBlockQuantized", [codes, ids, scale, *zeros], "embedding", **settings)


def _origin(value: Any) -> Any:
    """The initializer that a value is computed from."""
    while (producer := value.producer()) is not None:
        value = producer.inputs[0]
    return value


def defaults(graph: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The adapter inputs of a base's graph, of rank 0."""
    inputs = [value for value in graph.graph.inputs if value.const_value is not None]
    return {value.name: numbers(value) for value in inputs}


def container_bits(bitwidth: int) -> int:
    """Bits of a stored integer."""
    return next(bits for bits in (2, 4, 8) if bits >= bitwidth)


def operands(layer: PackedLayer) -> dict[str, np.ndarray[Any, Any]]:
    """Codes, scales and zero points of MatMulNBits:

    codes [out, blocks, bytes of a block], scale [out, blocks], zero_point [out, bytes of a row]
    """
    rows, columns = layer.tensor.shape
    block = NBITS.stored_block(layer.scheme, columns)
    assert block is not None
    encoding, scheme, bits = layer.encoding, layer.scheme, container_bits(layer.scheme.bitwidth)
    packed = pack_words(layer.codes, bits).view(torch.uint8)[:, : columns * bits // 8]

    def by_block(number: torch.Tensor) -> torch.Tensor:
        return spread(number, scheme.granularity, (rows, columns), block).contiguous()

    arrays = {
        "codes": packed.reshape(rows, columns // block, block * bits // 8).numpy(),
        "scale": by_block(encoding.scale).float().numpy(),
    }
    if scheme.float_offset:
        arrays["zero_point"] = by_block(-encoding.minimum / encoding.scale).float().numpy()
    # Without one, the zero point is the middle of the stored bits, not of a narrower grid.
    elif not scheme.symmetric or bits != scheme.bitwidth:
        zeros = by_block(-encoding.offset).to(torch.uint8)
        stored = pack_words(zeros, bits).view(torch.uint8)
        arrays["zero_point"] = stored[:, : -(-zeros.shape[1] * bits // 8)].numpy()
    return arrays
