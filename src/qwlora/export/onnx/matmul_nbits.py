"""The base as an ONNX model with a key-value cache, and a place for an adapter at every layer.

    input_ids, attention_mask, position_ids, past_key_values.N.key, .value, ...
        -> logits, present.N.key, present.N.value, ...

    y = MatMul(x, W)  becomes  y = MatMul(x, W) + MatMul(MatMul(x, M.lora_A), M.lora_B)

for every linear layer M. M.lora_A [in, r] and M.lora_B [r, out] are inputs with a default of rank
0, so that a session without an adapter computes the base. Ranks may differ between layers and
adapters. An adapter is a `.onnx_adapter` file with its factors under these names; lora_A is
transposed, and the scale is in lora_B.

Weights are the base's integers. `matmul_nbits` makes them operands of ONNX Runtime's MatMulNBits,
which has 2, 4 and 8 bits; others are stored in the next wider ones, with their own zero point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qwlora.errors import ExportError, listed
from qwlora.export.onnx.onnx_edits import (
    add_input,
    constants,
    load_graph,
    new_node,
    numbers,
    remove_unused,
    replace_value,
    write_adapter_file,
)
from qwlora.export.onnx.onnx_model import build_model
from qwlora.export.registry import NBITS, NBITS_BLOCKS
from qwlora.export.weights.weights_folder import largest_group, refuse, width_problem
from qwlora.formats.huggingface.int32_words import pack_words
from qwlora.graph.kv_cache_capture import capture_cached
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.encoding import spread
from qwlora.nn.packed_layer import PackedLayer, PackedLinear
from qwlora.simulation.placement import place
from qwlora.simulation.placement_rules import Schemes
from qwlora.simulation.simulation import base_encodings

EXACT = 1  # MatMulNBits' accuracy level: float32; 4 rounds activations to 8 bits
_DOMAIN = "com.microsoft"


def base_graph(model: PreTrainedModel) -> Any:
    """The `onnx_ir.Model` of a base, with DequantizeLinear nodes for its integers.

    Raises:
        ExportError: an operator has no translation.
        CaptureError: the model has no graph with a cache.
    """
    captured, known = capture_cached(model), base_encodings(model)
    placed = place(captured.program, Schemes(policy="weights-only"), captured.input_names).marks
    marks = tuple(mark for mark in placed if mark.kind is Kind.BASE)
    encodings = {mark.name: known[mark.name] for mark in marks}
    graph = QuantizedGraph(captured.program, captured.interface, marks, encodings)
    return build_model(graph, {})[0]


def add_branches_(graph: Any, model: PreTrainedModel) -> None:
    """Add the places for adapters to the graph of a base; see the module."""
    linears = linear_modules(model)
    for node, path in list(matrix_products(graph, linears)):
        layer, rank = linears[path], f"rank:{path}"
        if isinstance(layer, nn.Linear):
            rows, columns = layer.out_features, layer.in_features
        else:
            columns, rows = layer.get_parameter("weight").shape
        none_a, none_b = np.zeros((columns, 0), np.float32), np.zeros((0, rows), np.float32)
        a = add_input(graph, f"{path}.lora_A", none_a, (columns, rank))
        b = add_input(graph, f"{path}.lora_B", none_b, (rank, rows))
        inner = new_node("MatMul", [node.inputs[0], a], f"{path}.inner")
        outer = new_node("MatMul", [inner.outputs[0], b], f"{path}.update")
        total = new_node("Add", [node.outputs[0], outer.outputs[0]], f"{path}.adapted")
        replace_value(node.outputs[0], total.outputs[0])
        total.replace_input_with(0, node.outputs[0])
        graph.graph.insert_after(node, [inner, outer, total])


def matmul_nbits_(graph: Any, model: PreTrainedModel) -> None:
    """Make the packed linear layers of a base's graph MatMulNBits nodes."""
    problems = list[str]()
    layers = {p: module for p, module in model.named_modules() if isinstance(module, PackedLinear)}
    for node, path in list(matrix_products(graph, layers)):
        layer = layers[path]
        if problem := NBITS.problem(layer.scheme) or width_problem(layer, NBITS_BLOCKS):
            problems.append(f"{path}: {problem}")
            continue
        arrays, block = operands(layer)
        rows, columns = layer.tensor.shape
        attributes = {
            "K": columns,
            "N": rows,
            "bits": container_bits(layer.scheme.bitwidth),
            "block_size": block,
            "accuracy_level": EXACT,
        }
        inputs = [node.inputs[0], *constants(graph, path, arrays)]
        nodes = [new_node("MatMulNBits", inputs, f"{path}.output", attributes, _DOMAIN)]
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            terms = [nodes[0].outputs[0], node.inputs[2]]
            nodes.append(new_node("Add", terms, f"{path}.sum"))
        replace_value(node.outputs[0], nodes[-1].outputs[0])
        graph.graph.insert_before(node, nodes)
    refuse("genai", problems)
    graph.graph.opset_imports[_DOMAIN] = 1
    remove_unused(graph)


def write_onnx_adapter(
    factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], base: Path, path: Path
) -> None:
    """Write an `.onnx_adapter` file.

    It has the factors of all layers, of rank 0 where the adapter has none: onnxruntime-genai keeps
    what an earlier adapter of a generation set and the next one does not.

    Args:
        factors: see `CanonicalAdapter`.
        base: the base's model.

    Raises:
        ExportError: the base has no place for a module.
    """
    inputs = load_graph(base).graph.inputs
    values = {value.name: numbers(value) for value in inputs if value.const_value is not None}
    if missing := [name for name in factors if f"{name}.lora_A" not in values]:
        raise ExportError(
            f"the exported base has no place for the adapter's {listed(missing)}: they are no "
            "linear layers of the captured graph. Train the adapter without them"
        )
    for module, pair in factors.items():
        for half, factor in zip("AB", pair, strict=True):
            values[f"{module}.lora_{half}"] = factor.t().contiguous().float().numpy()
    write_adapter_file(values, path)


def matrix_products(graph: Any, modules: Any) -> Iterator[tuple[Any, str]]:
    """Nodes that multiply with the weight of a module, and the path of the module."""
    for node in graph.graph:
        if node.op_type in ("MatMul", "Gemm"):
            value, producer = node.inputs[1], node.inputs[1].producer()
            if producer is not None and producer.op_type == "Transpose":
                value = producer.inputs[0]
            path, is_weight, _ = str(value.name).rpartition(".weight")
            short = path.removeprefix("model.model.")
            for name in (path, f"model.{short}", short):
                if is_weight and name in modules:
                    yield node, name
                    break


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by path, packed or not."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | PackedLinear)
    }


def container_bits(bitwidth: int) -> int:
    """Bits of an integer in MatMulNBits."""
    return next(bits for bits in (2, 4, 8) if bits >= bitwidth)


def operands(layer: PackedLayer) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """Codes, scales and zero points of MatMulNBits, and its block size."""
    block, (rows, columns) = largest_group(layer, NBITS_BLOCKS), layer.tensor.shape
    assert block is not None
    encoding, scheme, bits = layer.encoding, layer.scheme, container_bits(layer.scheme.bitwidth)
    width = block * bits // 8
    packed = pack_words(layer.codes, bits).view(torch.uint8)[:, : columns * bits // 8]

    def by_block(number: torch.Tensor) -> torch.Tensor:
        return spread(number, scheme.granularity, (rows, columns), block).contiguous()

    arrays = {
        "codes": packed.reshape(rows, columns // block, width).numpy(),
        "scale": by_block(encoding.scale).float().flatten().numpy(),
    }
    if scheme.float_offset:
        zeros = by_block(-encoding.minimum / encoding.scale)
        arrays["zero_point"] = zeros.float().flatten().numpy()
    elif not scheme.symmetric or bits != scheme.bitwidth:
        zeros = by_block(-encoding.offset).to(torch.uint8)
        stored = pack_words(zeros, bits).view(torch.uint8)
        arrays["zero_point"] = stored[:, : -(-zeros.shape[1] * bits // 8)].flatten().numpy()
    return arrays, block
