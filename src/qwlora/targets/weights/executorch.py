"""The `executorch` target: a program for ExecuTorch on the CPU of a phone, and adapters.

    base/model.pte                the base with a key-value cache, and places for an adapter
    base/none.safetensors         zeros of rank 1: the base alone
    base/tokenizer.json, config.json, ...
    NAME/adapter.safetensors      M.lora_A [in, r], M.lora_B [r, out] of every linear layer M

`forward` takes tensors by position and returns the logits and the longer cache:

    input_ids [1, t], attention_mask [1, p + t], position_ids [1, t]     int64; p past tokens
    past_key_values.0.key, past_key_values.0.value, ...                  [1, heads, p, width]
    the tensors of an adapter, in the alphabetical order of their names
        -> logits [1, t, vocabulary], present.0.key, present.0.value, ...

A call has 1 to `TOKENS` tokens and 0 to `PAST` past ones. Every rank is 1 to `RANK`; lora_A is
transposed, and the scale is in lora_B.

    y = W x  becomes  y = W x' + (x A) B       x' is x rounded to 8 bits for each token

W x' is XNNPACK's product of a packed layer. It holds codes of 4 and 8 bits with one scale for each
output. Other bitwidths are stored exactly in these (2 and 3 bits in 4, 5 to 7 in 8). It also holds
blocks of 32 and its multiples, with 4 bits only. It rounds their scales to bfloat16, which is exact
for `Bf16Block`. It has no offsets. Other layers are floats. Rows of a packed embedding are
computed from its codes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # makes torch.ops.quantized_decomposed
from safetensors import numpy as arrays
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import CodeGen
from torch.nn.functional import embedding, linear
from transformers import PreTrainedModel

from qwlora.errors import ExportError, foreign_as
from qwlora.graph.capture import IDS, MASK, POSITIONS
from qwlora.graph.nodes import module_of, operation
from qwlora.grid.encoding import spread
from qwlora.grid.scheme import Blocks
from qwlora.nn.packed_layer import PackedLinear
from qwlora.nn.packed_tensor import narrowest
from qwlora.simulation.kv_cache_graph import capture_cached
from qwlora.targets.adapter_branches import Shapes, adapter_inputs, factor_shapes, zero_adapter
from qwlora.targets.canonical_adapter import CanonicalAdapter
from qwlora.targets.onnx.onnx_model import linear_modules
from qwlora.targets.proof.contents import SETTINGS, TOKENIZER, Contents
from qwlora.targets.target import Backend, ExportedBase, Rounding
from qwlora.targets.weights.executorch_program import ADAPTER, MODEL, NO_ADAPTER, ExecutorchRuntime
from qwlora.targets.weights.weights_folder import check_layers, write_settings

# The most of a call, of its cache, and of an adapter: ExecuTorch plans its memory for these sizes.
TOKENS, PAST, RANK = 128, 2048, 256
# Sizes of the example that torch.export sees: it takes equal sizes for one size, and a 1 for a
# constant.
_EXAMPLE = {"batch": 1, "tokens": 3, "past": 5, "context": 8, None: 2}


class Executorch(Backend):
    """XNNPACK's products; ExecuTorch runs it."""

    contents = Contents(base=(MODEL, NO_ADAPTER, *SETTINGS, *TOKENIZER), adapter=(ADAPTER,))

    def write_base(self, exported: ExportedBase, folder: Path) -> None:
        program, factors = switchable_program(exported.model, exported.embedding_bits)
        lower(program, folder / MODEL)
        # Rank 0 would be the natural way to switch off, but ExecuTorch 1.5.1 calls Eigen's product,
        # which refuses an empty matrix and leaves its output as it was.
        arrays.save_file(zero_adapter(factors, rank=1), folder / NO_ADAPTER)
        write_settings(exported, exported.model.config.get_text_config(), folder)

    def write_adapter(self, exported: CanonicalAdapter, base: Path, folder: Path) -> None:
        if exported.rank > RANK:
            raise ExportError(
                f"the adapter has rank {exported.rank}, and the exported base takes up to {RANK}. "
                "Train it with a smaller rank, or remove executorch from export.targets"
            )
        none = arrays.load_file(base / NO_ADAPTER)
        arrays.save_file(adapter_inputs(exported.factors, none), folder / ADAPTER)

    def open(self, folder: Path, case: str) -> ExecutorchRuntime:
        return ExecutorchRuntime(folder)

    def rounding(self, model: nn.Module) -> Rounding:
        # XNNPACK always rounds x, which training does not, so the file is compared with a model
        # that rounds alike. Where x is halfway between two steps, two correct roundings differ as
        # much as the rounding itself: the second model, nudged in the last bits, shows that.
        layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
        hooks, nudged = (
            [partial(layer.register_forward_pre_hook, partial(_rounded, nudge)) for layer in layers]
            for nudge in (0.0, 2.0**-22)
        )
        return Rounding(hooks, Rounding(nudged))


def switchable_program(
    model: PreTrainedModel, embedding_bits: int
) -> tuple[ExportedProgram, Shapes]:
    """The program of a base, and shapes of what adapters give it, in the order of the inputs."""
    captured = capture_cached(model)
    module = captured.program.module(check_guards=False)
    factors = _add_branches_(graph := module.graph, linear_modules(model).keys())
    _hold_codes_(module, model)
    _narrow_embeddings_(module, embedding_bits)
    graph.eliminate_dead_code()
    graph.set_codegen(CodeGen())  # inputs and outputs are as the graph has them
    # a new module, without the checks of the inputs that the exported one has
    module = GraphModule(module, graph)
    tokens, past = Dim.AUTO(min=1, max=TOKENS), Dim.AUTO(min=0, max=PAST)
    axes = {IDS: {1: tokens}, MASK: {1: Dim.AUTO(min=1, max=PAST + TOKENS)}, POSITIONS: {1: tokens}}
    shapes, example = list[dict[int, Any]](), list[Tensor]()
    sizes: dict[str, Any] = {**captured.interface.shapes, **factors}
    for name in (*captured.inputs, *factors):
        tensor = torch.ones([_EXAMPLE.get(size, size) for size in sizes[name]])
        example.append(tensor.long() if name in axes else tensor)
        rank = {sizes[name].index(None): Dim.AUTO(min=1, max=RANK)} if name in factors else {}
        shapes.append(axes.get(name) or rank or {2: past})
    with foreign_as(ExportError, "torch.export cannot add adapters"), torch.no_grad():
        program = torch.export.export(
            module, tuple(example), dynamic_shapes=tuple(shapes), strict=False
        )
    return program, factors


def _add_branches_(graph: Graph, linears: Collection[str]) -> Shapes:
    """Add x A B to every linear layer; returns what adapters give, in the order of the inputs."""
    products: list[tuple[str, Node, Any]] = []
    shapes: Shapes = {}
    for node in graph.nodes:
        path = module_of(node)[0].partition("@")[0]  # without the number of the call
        if operation(node) in ("linear", "addmm") and path in linears:
            products.append((path, node, x := node.args[operation(node) == "addmm"]))
            shapes |= factor_shapes(path, x.meta["val"].shape[-1], node.meta["val"].shape[-1])
    inputs, last = dict[str, Node](), [node for node in graph.nodes if node.op == "placeholder"][-1]
    for number, name in enumerate(sorted(shapes)):
        with graph.inserting_after(last):
            last = inputs[name] = graph.placeholder(f"factor_{number}")
    for path, node, x in products:
        factors = (inputs[f"{path}.lora_{half}"] for half in "AB")
        with graph.inserting_after(node):
            total = graph.call_function(_plus_branch, (node, x, *factors))
        node.replace_all_uses_with(total, partial(operator.is_not, total))
    return {name: shapes[name] for name in inputs}


def _plus_branch(y: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return y + (x @ a) @ b


def _hold_codes_(module: GraphModule, model: nn.Module) -> None:
    """Let what reads a packed weight read its codes."""
    paths = {
        node: str(node.args[0].target).removeprefix("model.").removesuffix(".packed")
        for node in module.graph.nodes
        if operation(node) == "dequantize"
    }
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in paths.values()}
    check_layers("executorch", layers)
    for node, path in paths.items():
        layer = layers[path]
        codes, scale = layer.quantized.signed_codes, layer.encoding.scale
        if not isinstance(layer.scheme.granularity, Blocks):
            shape = layer.tensor.shape
            scale = spread(scale, layer.scheme.granularity, shape, shape[1]).flatten()
        for user in list(node.users):
            match operation(user), user.args:
                case "embedding", [_, Node() as ids, *_]:
                    _replace_(module, user, _rows, ids, codes, scale)
                case "linear", [Node() as x, weight, *bias] if weight is node:
                    # XNNPACK has no products of other widths; codes of fewer bits fit exactly.
                    bits = 4 if layer.scheme.bitwidth <= 4 else 8
                    numbers = codes, scale, torch.zeros_like(scale, dtype=torch.int64)
                    _replace_(module, user, _product, x, *numbers, bits, *bias)
                case name, _:
                    raise ExportError(
                        f"{path}: {name} reads it, but XNNPACK supports only linear layers. Keep "
                        "it float, or export to other targets"
                    )


def _replace_(module: GraphModule, node: Node, by: Callable[..., Tensor], *arguments: Any) -> None:
    """Replace a node by a call of a function, whose tensors become buffers of the module."""
    graph, inputs = module.graph, []
    with graph.inserting_before(node):
        for argument in arguments:
            if isinstance(argument, Tensor):
                name = f"constant_{len(module._buffers)}"
                module.register_buffer(name, argument)
                argument = graph.get_attr(name)
            inputs.append(argument)
        node.replace_all_uses_with(graph.call_function(by, tuple(inputs)))


def _product(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, bias: Tensor | None = None
) -> Tensor:
    """W x', in the operators that XNNPACK's partitioner looks for."""
    ops: Any = torch.ops.quantized_decomposed
    ends = -(1 << bits - 1), (1 << bits - 1) - 1, torch.int8
    if scale.ndim == 1:
        weight = ops.dequantize_per_channel(codes, scale, zero, 0, *ends)
    else:
        block = codes.shape[1] // scale.shape[1]
        weight = ops.dequantize_per_channel_group(codes, scale, zero, *ends, block, torch.float32)
    step, middle = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
    of_x = step, middle, -128, 127, torch.int8
    rounded = ops.dequantize_per_token(ops.quantize_per_token(x, *of_x), *of_x, torch.float32)
    return linear(rounded, weight, bias)


def _rows(ids: Tensor, table: Tensor, scale: Tensor | None = None) -> Tensor:
    """Rows of an embedding: of codes, or of floats in 16 bits."""
    rows = embedding(ids, table).float()
    if scale is None:
        return rows
    scale = embedding(ids, scale.view(len(scale), -1)).unsqueeze(-1)
    return (rows.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)


def _narrow_embeddings_(module: GraphModule, bits: int) -> None:
    """Store embeddings that are floats in 16 bits where that is exact."""
    for node in list(module.graph.nodes):
        match operation(node), node.args:
            case "embedding", [Node(op="get_attr") as table, Node() as ids, *_] if bits == 16:
                stored = narrowest(operator.attrgetter(str(table.target))(module).detach())
                if stored.dtype != torch.float32:
                    _replace_(module, node, _rows, ids, stored)


def lower(program: ExportedProgram, path: Path) -> None:
    """Write a program for ExecuTorch: XNNPACK computes what is linear in constants."""
    from executorch import exir
    from executorch.backends.xnnpack.partition.config.gemm_configs import AddmmConfig, LinearConfig
    from executorch.backends.xnnpack.partition.config.xnnpack_config import ConfigPrecisionType
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    kinds, linears = ConfigPrecisionType, [LinearConfig, AddmmConfig]
    # Rounded products first: what the first partitioner takes, the second does not see.
    partitioner = [
        XnnpackPartitioner(config_precisions=kinds.DYNAMIC_QUANT, per_op_mode=True),
        XnnpackPartitioner(linears, kinds.FP32, per_op_mode=True),
    ]
    checks = exir.EdgeCompileConfig(_check_ir_validity=False)
    memory = exir.ExecutorchBackendConfig(
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),  # inputs stay in place
        sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),  # for the largest sizes
    )
    with foreign_as(ExportError, "ExecuTorch cannot lower the graph"), torch.no_grad():
        edge = exir.to_edge_transform_and_lower(program, None, partitioner, None, checks)
        with path.open("wb") as file:
            edge.to_executorch(memory).write_to_file(file)


def _rounded(nudge: float, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """What a packed linear layer multiplies, rounded as XNNPACK does:

        low = min(0, min x), high = max(0, max x) of each token,   s = (high - low) / 255
        x' = (clamp(round(x / s) + z, -128, 127) - z) s

    z is the integer nearest to -128 - low / s, or to 127 - high / s if low + high <= s.
    """
    x = inputs[0].float()
    # As if earlier layers had summed in another order: the last bits of every second value differ.
    if nudge:
        x = x * (1 + nudge * (torch.arange(x.shape[-1], device=x.device) % 2))
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    per_step = torch.where(high > low, 255 / (high - low), 1.0)
    first, last = low * per_step, high * per_step
    middle = torch.where(first + last > 1, -128 - first, 127 - last).clamp(-128, 127).round()
    codes = ((x * per_step).round() + middle).clamp(-128, 127)
    return ((codes - middle) / per_step).to(inputs[0].dtype)
