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
from qwlora.export.canonical_adapter import CanonicalAdapter
from qwlora.export.format_limits import NBITS_BLOCKS, nbits_problem
from qwlora.export.onnx.onnx_model import add_input, build_model, write_adapter_file
from qwlora.export.weights.weights_folder import largest_group, refuse, width_problem
from qwlora.formats.huggingface.int32_words import pack_words
from qwlora.graph.kv_cache_capture import capture_cached
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.grid.encoding import spread
from qwlora.nn.packed_layer import PackedLayer, PackedLinear
from qwlora.simulation.placement import place
from qwlora.simulation.placement_rules import Schemes
from qwlora.simulation.simulation import base_encodings
from qwlora.system.optional_packages import require

EXACT = 1  # MatMulNBits' accuracy level: float32; 4 rounds activations to 8 bits
_DOMAIN = "com.microsoft"


def switchable_model(model: PreTrainedModel, branches: bool = True) -> Any:
    """The `onnx_ir.Model` of a base, with DequantizeLinear nodes for its integers.

    Args:
        branches: whether to add the places for adapters.

    Raises:
        ExportError: an operator has no translation.
        CaptureError: the model has no graph with a cache.
    """
    captured = capture_cached(model)
    schemes = Schemes(policy="weights-only")
    placed = place(captured.program, schemes, captured.input_names).marks
    marks = tuple(mark for mark in placed if mark.kind is Kind.BASE)
    known = base_encodings(model)
    graph = QuantizedGraph(
        captured.program,
        captured.interface,
        marks,
        {mark.name: known[mark.name] for mark in marks},
    )
    made, _ = build_model(graph, {})
    if branches:
        _add_branches(made, model)
    return made


def matmul_nbits(made: Any, model: PreTrainedModel) -> None:
    """Make the packed linear layers of `made` MatMulNBits nodes, in place.

    Raises:
        ExportError: a layer's grid does not fit; all are listed.
    """
    ir = require("onnx_ir", "onnx")
    problems = list[str]()
    layers = {p: module for p, module in model.named_modules() if isinstance(module, PackedLinear)}
    for node, path in list(matrix_products(made, layers)):
        layer = layers[path]
        if problem := nbits_problem(layer.scheme) or width_problem(layer, NBITS_BLOCKS):
            problems.append(f"{path}: {problem}")
            continue
        arrays, block = _operands(layer)
        rows, columns = layer.tensor.shape
        inputs = [node.inputs[0]]
        for part, array in arrays.items():
            value = ir.val(f"{path}.{part}", const_value=ir.tensor(array, name=f"{path}.{part}"))
            made.graph.register_initializer(value)
            inputs.append(value)
        attributes = {
            "K": columns,
            "N": rows,
            "bits": _container(layer.scheme.bitwidth),
            "block_size": block,
            "accuracy_level": EXACT,
        }
        new = ir.node(
            "MatMulNBits", inputs, attributes=attributes, domain=_DOMAIN, name=f"{path}/product"
        )
        nodes = [new]
        if node.op_type == "Gemm" and len(node.inputs) > 2:
            new.outputs[0].name = f"{path}.product"
            nodes.append(ir.node("Add", [new.outputs[0], node.inputs[2]], name=f"{path}/bias"))
        nodes[-1].outputs[0].name = f"{path}.output"
        _take_place(made, node.outputs[0], nodes[-1].outputs[0])
        made.graph.insert_before(node, nodes)
        made.graph.remove(node, safe=True)
    refuse("genai", problems)
    made.graph.opset_imports[_DOMAIN] = 1
    _remove_unused(made)


def write_onnx_adapter(
    adapter: CanonicalAdapter, empty: Mapping[str, np.ndarray[Any, Any]], path: Path
) -> None:
    """Write an `.onnx_adapter` file.

    It has the factors of all layers, of rank 0 where the adapter has none: onnxruntime-genai keeps
    what an earlier adapter of a generation set and the next one does not.

    Args:
        empty: `empty_factors` of the base's model.

    Raises:
        ExportError: the base has no place for a module.
    """
    if missing := [name for name in adapter.factors if f"{name}.lora_A" not in empty]:
        raise ExportError(
            f"the exported base has no place for the adapter's {listed(missing)}: they are no "
            "linear layers of the captured graph. Train the adapter without them"
        )
    arrays = dict(empty)
    for module, (a, b) in adapter.factors.items():
        for half, factor in (("A", a), ("B", b)):
            array = factor.t().contiguous().numpy().astype(np.float32)
            arrays[f"{module}.lora_{half}"] = array
    write_adapter_file(arrays, path)


def empty_factors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The factors of rank 0 of all layers of an ONNX file, by the names of its inputs."""
    model = require("onnx_ir", "onnx").load(path)
    return {
        value.name: value.const_value.numpy()
        for value in model.graph.inputs
        if value.const_value is not None
    }


def _add_branches(made: Any, model: PreTrainedModel) -> None:
    ir = require("onnx_ir", "onnx")
    linears = linear_modules(model)
    for node, path in list(matrix_products(made, linears)):
        rows, columns = _shape(linears[path])
        sides = (("A", (columns, f"rank:{path}")), ("B", (f"rank:{path}", rows)))
        factors = [
            add_input(made, f"{path}.lora_{half}", _empty(shape), shape) for half, shape in sides
        ]
        inner = ir.node("MatMul", [node.inputs[0], factors[0]], name=f"{path}/lora_A")
        outer = ir.node("MatMul", [inner.outputs[0], factors[1]], name=f"{path}/lora_B")
        old = node.outputs[0]
        total = ir.node("Add", [old, outer.outputs[0]], name=f"{path}/lora_add")
        for new, suffix in ((inner, "inner"), (outer, "update"), (total, "adapted")):
            new.outputs[0].name = f"{path}.{suffix}"
        _take_place(made, old, total.outputs[0])
        total.replace_input_with(0, old)
        made.graph.insert_after(node, [inner, outer, total])


def _empty(shape: tuple[int | str, ...]) -> np.ndarray[Any, Any]:
    return np.zeros([0 if isinstance(size, str) else size for size in shape], np.float32)


def _take_place(made: Any, old: Any, new: Any) -> None:
    """Let `new` take the place of `old` for everyone who reads it, with its name if it is an output
    of the graph."""
    ir = require("onnx_ir", "onnx")
    new.type, new.shape = old.type, old.shape
    for index, output in enumerate(made.graph.outputs):
        if output is old:
            name = old.name
            old.name, new.name = f"{name}.before", name
            made.graph.outputs[index] = new
    ir.convenience.replace_all_uses_with(old, new)


def matrix_products(made: Any, modules: Any) -> Iterator[tuple[Any, str]]:
    """Nodes that multiply with the weight of a module, and the path of the module."""
    for node in made.graph:
        if node.op_type in ("MatMul", "Gemm"):
            value, producer = node.inputs[1], node.inputs[1].producer()
            if producer is not None and producer.op_type == "Transpose":
                value = producer.inputs[0]
            path = str(value.name).removeprefix("model.model.").removesuffix(".weight")
            for name in (str(value.name).removesuffix(".weight"), f"model.{path}", path):
                if str(value.name).endswith(".weight") and name in modules:
                    yield node, name
                    break


def linear_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by path, packed or not."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | PackedLinear)
    }


def _shape(module: nn.Module) -> tuple[int, int]:
    """[out, in]."""
    if isinstance(module, PackedLinear):
        rows, columns = module.tensor.shape
        return rows, columns
    weight = module.get_parameter("weight")
    rows, columns = weight.t().shape if isinstance(module, Conv1D) else weight.shape
    return rows, columns


def _remove_unused(made: Any) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    inputs = list(made.graph.inputs)
    RemoveUnusedNodesPass()(made)
    assert len(inputs) == len(made.graph.inputs)


def _container(bitwidth: int) -> int:
    return next(bits for bits in (2, 4, 8) if bits >= bitwidth)


def _operands(layer: PackedLayer) -> tuple[dict[str, np.ndarray[Any, Any]], int]:
    """Codes, scales and zero points of MatMulNBits, and its block size."""
    block, (rows, columns) = largest_group(layer, NBITS_BLOCKS), layer.tensor.shape
    assert block is not None
    encoding, scheme, bits = layer.encoding, layer.scheme, _container(layer.scheme.bitwidth)
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
