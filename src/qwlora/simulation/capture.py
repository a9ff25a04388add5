"""Capture: one graph of base plus adapter by `torch.export`, cleaned, and proved to compute what the module computes.

No tracing and no registration. The graph shares the module's storage. Batch and sequence are dynamic. What carries no
arithmetic in this graph is taken out (assertions, casts to the same type, dropout at rest, copies for layout), so that a value has one node.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import Node

from qwlora.errors import CaptureError
from qwlora.grid.graph import with_graph

_aten = torch.ops.aten
_COPIES = (_aten.contiguous.default, _aten.alias.default, _aten.detach.default, _aten.lift_fresh_copy.default)
_CASTS = (_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten._to_copy.default, _aten.type_as.default)


class ForwardLogits(nn.Module):
    """`model(**inputs).logits` with positional inputs: the shape of call that every causal language model captures with."""

    def __init__(self, model: nn.Module, inputs: tuple[str, ...]):
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *tensors: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.inputs, tensors, strict=True)), use_cache=False).logits
        return logits


def capture(model: nn.Module, example_inputs: Mapping[str, Tensor]) -> ExportedProgram:
    """The graph of `model(**example_inputs).logits`; the first two axes of each input are dynamic.

    Args:
        example_inputs: at least two tokens, since a size of 1 would be taken for a constant; a single row is captured twice.

    Raises:
        CaptureError: `torch.export` refuses the model, or the graph's result differs from the module's in any bit, at the example's shape or another.
    """
    names = tuple(example_inputs)
    tensors = tuple((t.repeat(2, *[1] * (t.ndim - 1)) if t.shape[0] == 1 else t).contiguous() for t in example_inputs.values())
    if any(size < 2 for t in tensors for size in t.shape[:2]):
        raise CaptureError("example inputs need at least two tokens, so that their number is not taken for a constant")
    if any(module.training for module in model.modules()):
        raise CaptureError("the model is in training mode; call model.eval() first, the graph is made for one mode")
    wrapper = ForwardLogits(model, names).eval()
    if hasattr(model, "set_attn_implementation"):
        cast(Any, model).set_attn_implementation("eager")  # the only implementation whose inner values are nodes
    shapes = {"tensors": tuple(dict.fromkeys(range(min(2, t.ndim)), Dim.DYNAMIC) for t in tensors)}
    try:
        with torch.no_grad():
            program = torch.export.export(wrapper, tensors, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises a dozen kinds; each means the same to the caller
        raise CaptureError(f"torch.export cannot capture {type(model).__name__}: {error}") from error
    program = _clean(program)
    prove(program, wrapper, tensors)
    return program


def prove(program: ExportedProgram, wrapper: nn.Module, tensors: tuple[Tensor, ...]) -> None:
    """Compare the graph with the module, bit for bit, at the captured shape and at a smaller one."""
    module = program.module(check_guards=False)
    smaller = tuple(t[:1, : max(2, t.shape[1] // 2)] if t.ndim > 1 else t for t in tensors)
    for inputs in (tensors, smaller):
        with torch.no_grad():
            expected, found = wrapper(*inputs), module(*inputs)
        if not bool(((expected == found) | (expected.isnan() & found.isnan())).all()):
            shape = [list(t.shape) for t in inputs]
            raise CaptureError(
                f"the captured graph differs from the module by {float((expected - found).abs().max()):.3g} at input shapes {shape}; "
                "look for randomness or shape-dependent branches in the model"
            )


def _clean(program: ExportedProgram) -> ExportedProgram:
    graph = copy.deepcopy(program.graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif _changes_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return with_graph(program, graph)


def _changes_nothing(node: Node) -> bool:
    if node.target in _COPIES:
        return True
    if node.target is _aten.dropout.default:
        return node.args[2] is False
    if node.target in _CASTS:
        before, after = _value(node.args[0]), _value(node)
        return before is not None and after is not None and before.dtype == after.dtype and before.device == after.device
    return False


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None
