"""The ONNX form of an `NpuGraph` that Qualcomm's HTP takes whole.

It is the form of `onnx_model.py`, rewritten where the HTP computed something wrongly, or left it to
the CPU. All of this was measured with onnxruntime-qnn 2.7 (docs/log/runtimes.md).

Codes of lora_A and lora_B are inputs, not initializers, and `lora_alpha` is a quantized input. So
one file serves every adapter: a runtime sets the adapter's codes as inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.fx import Node

from qwlora.errors import ExportError
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.system.optional_packages import require
from qwlora.system.parameter_names import is_factor_name
from qwlora.targets.onnx.onnx_model import (
    build_model,
    constant,
    constants,
    insert_rounding,
    new_node,
    numbers,
    remove_unused,
)

OPSET = 23  # the first with RMSNormalization
CODES = ".codes"
_BLOCKS = (64, 32, 16)
# what an 8-bit value may come from without an operator of another width between
_KEEPS_WIDTH = frozenset({"DequantizeLinear", "Concat", "Gather"})
_QUANTIZERS = ("DequantizeLinear", "QuantizeLinear")
_PRODUCTS = ("MatMul", "Mul")


def npu_onnx(graph: QuantizedGraph, metadata: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """The `onnx_ir.Model` of a device graph, and the adapter's codes by input name."""
    model, _ = build_model(graph, metadata, OPSET)
    traced = {node.name: node for node in graph.program.graph.nodes}
    for node in list(model.graph):
        if node.op_type == "DequantizeLinear" and len(node.inputs) == 2:
            _add_zero_point_(model, node)
        elif node.op_type == "Gemm":
            _split_gemm_(model, node)
        elif node.op_type == "Conv":
            _shape_kernel_(model, node)
            _quantize_moved_(model, node)
        elif node.op_type == "RMSNormalization":
            _round_norm_(model, node)
        elif node.op_type == "GroupNormalization":
            _split_group_norm_(model, node, traced)
    # before `_widen_` looks for 8-bit values, so that it sees the nodes that these add
    for node in list(model.graph):
        if node.op_type == "Gather":
            _quantize_gathered_(model, node)
        elif node.op_type == "MatMul":
            _repeat_scales_(model, node)
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear":
            _widen_(model, node)
        elif node.op_type == "Mul":
            _put_norm_second_(node)
        elif node.op_type in ("Gemm", "Conv"):
            _quantize_bias_(model, node)
        elif node.op_type == "Add":
            _quantize_before_bias_(model, node)
    remove_unused(model)
    return model, _adapter_inputs_(model, graph)


def _add_zero_point_(model: Any, node: Any) -> None:
    # ONNX takes a missing zero point as 0, but the HTP then computes int4 weights wrongly (-9 dB).
    codes, scale = (value.const_value for value in node.inputs)
    zeros = np.zeros(tuple(scale.shape), codes.numpy().dtype)
    node.resize_inputs(3)
    node.replace_input_with(2, *constants(model, node.outputs[0].name, {"zero_point": zeros}))


def _shape_kernel_(model: Any, node: Any) -> None:
    """Store the packed weight of a convolution, a matrix that is reshaped, in its own shape."""
    # With a Reshape between weight and Conv, the CPU dequantizes the weight.
    reshape = node.inputs[1].producer()
    stored = reshape.inputs[0].producer() if reshape and reshape.op_type == "Reshape" else None
    if stored is None or stored.op_type != "DequantizeLinear" or "block_size" in stored.attributes:
        return
    codes, kernel = numbers(stored.inputs[0]), node.attributes["kernel_shape"].value
    shaped = codes.reshape(len(codes), -1, *kernel)
    stored.replace_input_with(0, constant(model, stored.inputs[0].name, shaped))
    node.replace_input_with(1, stored.outputs[0])
    stored.outputs[0].shape = None


def _quantize_moved_(model: Any, node: Any) -> None:
    """Quantize the input of a convolution once more, on its grid, if it was moved in between."""
    # An input that was upsampled or transposed after its quantization is float to the HTP, which
    # then multiplies in half precision. It was only moved, so its grid still fits:
    # `kv_cache_graph.py` refuses computed values without a grid.
    moved = node.inputs[0]
    stored = moved.producer()
    while stored is not None and stored.op_type != "DequantizeLinear":
        stored = stored.inputs[0].producer()
    if stored is not None and stored is not moved.producer():
        readers = [user for user, _ in moved.uses() if user.op_type == "Conv"]
        insert_rounding(model, moved, f"{moved.name}.moved", list(stored.inputs[1:]), readers)


def _split_gemm_(model: Any, node: Any) -> None:
    """Make a MatMul and an Add of a Gemm whose weight has 4 bits or less."""
    # `_repeat_scales_` needs blocks, and the HTP refuses a Gemm with blocks or computes it wrongly.
    weight = node.inputs[1].producer()
    if len(node.inputs) < 3 or not _has_four_bits(weight) or not _reads_wide(node):
        return
    is_turned = bool(node.attributes.get_int("transB", 0))
    is_shared = len(weight.outputs[0].uses()) > 1
    if node.attributes.get_int("transA", 0) or (is_turned and is_shared):
        return
    if is_turned:
        _turn_(model, weight)
    name = node.outputs[0].name
    product = new_node("MatMul", node.inputs[:2], f"{name}.product")
    total = new_node("Add", [product.outputs[0], node.inputs[2]], f"{name}.sum")
    node.outputs[0].replace_all_uses_with(total.outputs[0], replace_graph_outputs=True)
    model.graph.insert_before(node, [product, total])
    model.graph.remove(node, safe=True)
    total.outputs[0].name = name


def _round_norm_(model: Any, node: Any) -> None:
    """Make a LayerNormalization of a norm that is only added to something, of 16 bits."""
    # The HTP rounds RMSNormalization down, half a step too low on average. Added to the residual
    # stream, as in Gemma 3, this shifts it in every layer (270M: 19.8 dB, so 23.7).
    # LayerNormalization is rounded to the nearest step, and of x and -x side by side it is
    # RMSNormalization, since their mean is 0. Other norms stay: there, a symmetric grid for x costs
    # as much as the rest gains.
    x, weight, name = node.inputs[0], node.inputs[1].producer(), node.outputs[0].name
    stored, readers = x.producer(), _readers(node.outputs[0])
    is_added = {reader.op_type for reader in readers} == {"Add"}
    if not is_added or stored is None or stored.op_type != "DequantizeLinear":
        return
    scale, zero_point = (numbers(value) for value in stored.inputs[1:])
    if zero_point.dtype != np.uint16:
        return
    farthest = max(int(zero_point), 65535 - int(zero_point))
    wider = np.float32(scale * np.float32(farthest / 32767))
    # symmetric, so that -x lies on the same grid
    arrays = {"scale": wider, "zero_point": np.uint16(32768)}
    grid = constants(model, f"{name}.input", arrays)
    insert_rounding(model, x, f"{name}.input", grid, [node])
    x, codes = node.inputs[0], numbers(weight.inputs[0])
    negative = new_node("Neg", [x], f"{name}.negative")
    both = new_node("Concat", [x, negative.outputs[0]], f"{name}.both", {"axis": -1})
    twice = constants(model, f"{weight.outputs[0].name}.twice", {"codes": np.tile(codes, 2)})
    values = new_node("DequantizeLinear", [*twice, *weight.inputs[1:]], f"{name}.weight")
    attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].value}
    factors = [both.outputs[0], values.outputs[0]]
    norm = new_node("LayerNormalization", factors, f"{name}.norm", attributes)
    part = {"start": [0], "end": codes.shape, "axis": [-1]}
    bounds = constants(model, name, {key: np.array(end, np.int64) for key, end in part.items()})
    half = new_node("Slice", [norm.outputs[0], *bounds], f"{name}.half")
    quantize = next(iter(node.outputs[0].uses()))[0]
    node.outputs[0].replace_all_uses_with(half.outputs[0])
    model.graph.insert_before(node, [negative, both, values, norm, half])
    model.graph.remove(node, safe=True)
    insert_rounding(model, negative.outputs[0], f"{name}.negated", grid, [both])
    insert_rounding(model, both.outputs[0], f"{name}.pair", grid, [norm])
    insert_rounding(model, norm.outputs[0], f"{name}.normed", quantize.inputs[1:], [half])


def _split_group_norm_(model: Any, node: Any, traced: Mapping[str, Node]) -> None:
    """Make a LayerNormalization of each group, a product and a sum of a group norm."""
    # The HTP has no GroupNormalization, and its InstanceNormalization loses 20 dB where the mean is
    # large.
    (x, *factors), name, nodes = node.inputs, node.outputs[0].name, []
    shape = traced[name].meta["val"].shape
    size = math.prod(shape[1:]) // node.attributes["num_groups"].value
    low, high = _ends(next(iter(node.outputs[0].uses()))[0])

    def add(operator: str, inputs: Sequence[Any], part: str, **attributes: Any) -> Any:
        nodes.append(new_node(operator, inputs, f"{name}.{part}", attributes))
        return nodes[-1].outputs[0]

    def stored(part: str, codes: Any, scale: Any, zero_point: Any) -> Any:
        arrays = {"codes": codes, "scale": scale, "zero_point": zero_point}
        return add("DequantizeLinear", constants(model, f"{name}.{part}", arrays), part)

    ones = stored("ones", np.ones(size, np.int16), np.float32(1), np.int16(0))
    groups = add("Reshape", [x, constant(model, f"{name}.split", [shape[0], -1, size])], "groups")
    epsilon = node.attributes["epsilon"].value
    norm = add("LayerNormalization", [groups, ones], "norm", axis=-1, epsilon=epsilon)
    result = add("Reshape", [norm, constant(model, f"{name}.shape", list(shape))], "joined")
    joined = nodes[-1]
    affine: list[Any] = [1.0, 0.0]  # of a norm without weight and bias
    for index, (operator, factor) in enumerate(zip(("Mul", "Add"), factors, strict=True)):
        if (part := factor.producer()) is None:
            raise ExportError(
                f"{factor.name} has no grid, and Qualcomm's HTP takes no group norm with a float "
                "weight. Remove the rule that keeps it float"
            )
        if part.op_type == "DequantizeLinear":
            affine[index] = _dequantized(part)
            # As int16, a factor cost 8 dB; the same values as uint16 cost nothing.
            codes = numbers(part.inputs[0]).astype(np.int32) + 32768
            shaped = np.uint16(codes).reshape(-1, *[1] * (len(shape) - 2))
            values = stored(f"{operator}.by", shaped, numbers(part.inputs[1]), np.uint16(32768))
            result = add(operator, [result, values], operator)
    node.outputs[0].replace_all_uses_with(result)
    model.graph.insert_before(node, nodes)
    model.graph.remove(node, safe=True)
    # The simulation has no grid for the normalized values. They need what the result's grid holds,
    # and never exceed sqrt(size), the largest of `size` values of variance 1.
    weight, bias = affine
    end = np.max(np.maximum(high - bias, bias - low) / np.maximum(np.abs(weight), 1e-9))
    scale = np.float32(min(end, math.sqrt(size)) / 32767)
    grid = constants(model, f"{name}.normal", {"scale": scale, "zero_point": np.uint16(32768)})
    insert_rounding(model, norm, f"{name}.normal", grid, [joined])


def _ends(quantize: Any) -> tuple[float, float]:
    scale, zero_point = (numbers(value) for value in quantize.inputs[1:])
    steps, zero = np.iinfo(zero_point.dtype).max, float(zero_point)
    return -zero * float(scale), (steps - zero) * float(scale)


def _turn_(model: Any, stored: Any) -> None:
    """Store a constant [out, in] as [in, out], under the same names."""
    for index, value in enumerate(stored.inputs):
        if value.shape.rank() == 2:
            turned = np.ascontiguousarray(numbers(value).T)
            stored.replace_input_with(index, constant(model, value.name, turned))
    stored.outputs[0].shape = require("onnx_ir", "onnx").Shape(stored.inputs[0].shape)
    if "axis" in stored.attributes:
        _set_(stored, "axis", 1 - stored.attributes["axis"].value)


def _repeat_scales_(model: Any, node: Any) -> None:
    """Give a 4-bit weight [in, out] with one scale, or one per channel, scales by block."""
    # With one scale per channel, the HTP drops the lowest 8 bits of each sum, which is 127.5 steps
    # of scale(x) * scale(w) too low on average: 38 to 62 dB in SmolLM2. The same scale once for
    # every block is rounded: 58 to 68 dB. Weights of 8 bits are worse in blocks (69 dB against 77).
    stored = node.inputs[1].producer()
    if not _has_four_bits(stored) or not _reads_wide(node):
        return
    inputs, outputs = stored.inputs[0].shape
    scale = numbers(stored.inputs[1])
    size = next((size for size in _BLOCKS if inputs % size == 0), None)
    if scale.ndim > 1 or size is None:
        return
    scales = np.tile(np.broadcast_to(scale, outputs), (inputs // size, 1))
    zeros = np.zeros(scales.shape, numbers(stored.inputs[2]).dtype)
    grid = constants(model, f"{stored.outputs[0].name}.blocks", {"scale": scales, "zero": zeros})
    for index, value in enumerate(grid, 1):
        stored.replace_input_with(index, value)
    _set_(stored, "axis", 0)
    _set_(stored, "block_size", size)


def _set_(node: Any, name: str, value: int) -> None:
    node.attributes[name] = require("onnx_ir", "onnx").AttrInt64(name, value)


def _has_four_bits(node: Any) -> bool:
    if node is None or node.op_type != "DequantizeLinear" or not node.inputs[0].is_initializer():
        return False
    int4 = require("onnx_ir", "onnx").DataType.INT4
    return bool(node.inputs[0].const_value.dtype == int4)


def _quantize_gathered_(model: Any, node: Any) -> None:
    """Quantize what a Gather reads from a table on one grid, on that grid."""
    # Otherwise the CPU dequantizes the whole table.
    table = node.inputs[0].producer()
    if table is None or table.op_type != "DequantizeLinear" or table.inputs[1].shape.rank():
        return
    gathered, name = node.outputs[0], f"{table.outputs[0].name}.gathered"
    insert_rounding(model, gathered, name, table.inputs[1:], gathered.consumers())


def _put_norm_second_(node: Any) -> None:
    """Swap the factors of a product if the first is a norm, or the second an input."""
    # With a norm as the first factor, the HTP takes the other one for the norm's weight (-6 dB).
    first, second = node.inputs
    operator = _made_by(first)
    is_norm = operator is not None and operator.op_type == "RMSNormalization"
    if is_norm or (_made_by(second) is None and operator is not None):
        node.replace_input_with(0, second)
        node.replace_input_with(1, first)


def _made_by(value: Any) -> Any:
    """The node before the quantization of a value; None if that is an input or a constant."""
    source = value.producer()
    while source is not None and source.op_type in _QUANTIZERS:
        source = source.inputs[0].producer()
    return source


def _readers(value: Any) -> list[Any]:
    readers = []
    for user, _ in value.uses():
        readers += _readers(user.outputs[0]) if user.op_type in _QUANTIZERS else [user]
    return readers


def _quantize_bias_(model: Any, node: Any) -> None:
    """Give the bias of a Gemm or Conv with a quantized input and weight their product's grid."""
    if len(node.inputs) < 3:
        return
    x, weight, bias = (value.producer() for value in node.inputs)
    if any(part is None or part.op_type != "DequantizeLinear" for part in (x, weight, bias)):
        return
    value, name = _dequantized(bias), bias.outputs[0].name
    # the grid of the sums before they are rescaled, so the bias needs no rescaling of its own
    scale = (numbers(x.inputs[1]) * numbers(weight.inputs[1])).astype(np.float32)
    codes = np.round(value.astype(np.float64) / scale)
    if np.abs(codes).max(initial=0) > 2**31 - 1:
        raise ExportError(
            f"{name}: {value.flat[np.abs(codes).argmax()]:g} is more than 2^31 steps of its "
            f"layer's input and weight ({scale.min():g}), which Qualcomm's HTP cannot hold. Give "
            "the layer's weight more bits, or a scale per channel"
        )
    zeros = np.zeros(scale.shape, np.int32)
    arrays = {"codes": codes.astype(np.int32), "scale": scale, "zero_point": zeros}
    parts, axis = constants(model, f"{name}.int32", arrays), {"axis": 0} if scale.ndim else {}
    values = new_node("DequantizeLinear", parts, f"{name}.int32", axis)
    node.replace_input_with(2, values.outputs[0])
    model.graph.insert_before(node, values)


def _quantize_before_bias_(model: Any, node: Any) -> None:
    """Give the product before an added bias the grid of the sum, widened by the bias."""
    # A MatMul has no input for a bias in int32, so its result needs a grid before the sum.
    product, bias = node.inputs
    if product.producer() is None or product.producer().op_type not in _PRODUCTS:
        product, bias = bias, product
    source, stored = product.producer(), bias.producer()
    quantize: Any = next((user for user, _ in node.outputs[0].uses()), None)
    parts = (source, _PRODUCTS), (stored, _QUANTIZERS[:1]), (quantize, _QUANTIZERS[1:])
    if any(part is None or part.op_type not in operators for part, operators in parts):
        return
    if not stored.inputs[0].is_initializer() or not _reads_wide(source):
        return
    values, (low, high) = _dequantized(stored), _ends(quantize)
    low, high = low - max(float(values.max()), 0.0), high - min(float(values.min()), 0.0)
    wider = np.float32((high - low) / 65535)
    name = f"{quantize.outputs[0].name.removesuffix(CODES)}.product"
    grid = {"scale": wider, "zero_point": np.uint16(round(-low / float(wider)))}
    insert_rounding(model, product, name, constants(model, name, grid), [node])


def _dequantized(node: Any) -> Any:
    """The value of a DequantizeLinear of a constant on one grid."""
    codes, scale, zero_point = (numbers(value) for value in node.inputs)
    return (codes.astype(np.float64) - zero_point) * scale


def _widen_(model: Any, node: Any) -> None:
    """Quantize to 16 bits before 8 bits what an operator of 16-bit inputs computed."""
    # An operator's inputs and output have one width on the HTP.
    value, scale, zero_point = node.inputs
    producer = value.producer()
    if producer is None or producer.op_type in _KEEPS_WIDTH or not _reads_wide(producer):
        return
    if numbers(zero_point).dtype != np.uint8:
        return
    name = f"{node.outputs[0].name.removesuffix(CODES)}.wide"
    # 65535 / 255 = 257, so every step of the coarse grid is one of the finer grid, too
    finer, zero = np.float32(257), numbers(zero_point).astype(np.uint16) * np.uint16(257)
    grid = {"scale": numbers(scale) / finer, "zero_point": zero}
    insert_rounding(model, value, name, constants(model, name, grid), [node])


def _reads_wide(node: Any) -> bool:
    """Whether a node reads an activation of 16 bits, or a float value that is made of one."""
    before = [value.producer() for value in node.inputs if value is not None]
    return any(
        numbers(source.inputs[2]).dtype == np.uint16
        if source.op_type == "DequantizeLinear"
        else _reads_wide(source)
        for source in before
        if source is not None
    )


def _adapter_inputs_(model: Any, graph: QuantizedGraph) -> dict[str, Any]:
    """Make inputs of the codes of adapter weights, [in, out] of linear layers; returns their
    values."""
    ir, arrays = require("onnx_ir", "onnx"), dict[str, Any]()
    for mark in graph.marks:
        if mark.kind is Kind.ADAPTER and is_factor_name(mark.name):
            stored = model.graph.initializers[f"{mark.name}{CODES}"].consumers()[0]
            for node in stored.outputs[0].consumers():
                if node.op_type == "Gemm" and node.attributes.get_int("transB", 0):
                    _turn_(model, stored)
                    _set_(node, "transB", 0)
            value = model.graph.initializers.pop(f"{mark.name}{CODES}")
            codes, value.const_value = value.const_value, None
            arrays[value.name] = codes.numpy()
            value.type, value.shape = ir.TensorType(codes.dtype), codes.shape
            model.graph.inputs.append(value)
    return arrays
