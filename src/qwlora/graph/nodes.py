"""Nodes of a captured graph: their operators, their modules, and the tensors that they read.

ATen operators by what they do to values, for placement:

    MOVES_DATA        every output value is an input value, so the input's encoding also holds it
    MATRIX_PRODUCTS   matrix products, with the positions of their factors

All others compute new values. In-place operators are listed without their trailing underscore.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from qwlora.system.parameter_names import canonical_name


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVES_DATA = _names("""
    view reshape _unsafe_view view_as transpose permute t mT movedim moveaxis swapaxes swapdims
    adjoint numpy_T
    expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile squeeze unsqueeze
    flatten unflatten ravel unfold as_strided atleast_2d
    slice select narrow index index_select gather take take_along_dim diagonal masked_select
    split split_with_sizes chunk unsafe_chunk unsafe_split unbind tensor_split hsplit vsplit dsplit
    roll flip fliplr flipud rot90
    pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col
    clone contiguous alias detach lift_fresh lift_fresh_copy to _to_copy type_as real imag positive
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices adaptive_max_pool1d adaptive_max_pool2d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d
    topk sort amax amin tril triu
""")

# Positions of the factors; an argument may also be a list of factors.
MATRIX_PRODUCTS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(
        _names("""
            linear matmul mm mv bmm dot inner outer tensordot _grouped_mm grouped_mm
            convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
        """),
        (0, 1),
    ),
    **dict.fromkeys(_names("addmm addmv addbmm baddbmm"), (1, 2)),
    "einsum": (1,),
    "bilinear": (0, 1, 2),
    "scaled_dot_product_attention": (0, 1, 2),
}

# A module that runs one of these is several operations in a runtime, whatever its class name.
SEVERAL_OPERATIONS = frozenset(MATRIX_PRODUCTS) | {"softmax", "dequantize"}

# Operators that apply a mask.
MASKS = frozenset({"add", "sub", "where", "masked_fill", "mul"})
# Operators that read masked values.
SOFTMAXES = frozenset({"softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax"})

# Frequent operators whose result is never a view of an argument, so that it may be overwritten.
OVERWRITABLE = frozenset(MATRIX_PRODUCTS) - {"einsum"} | _names("""
    add sub mul div neg pow sqrt rsqrt exp sum mean cumsum cat
    relu gelu silu sigmoid tanh softmax _softmax embedding layer_norm rms_norm group_norm batch_norm
""")


def base_name(operator: str) -> str:
    """The operator's name without the trailing underscore of an in-place variant."""
    return operator[:-1] if operator.endswith("_") and not operator.endswith("__") else operator


def operator_of(node: Node) -> str:
    """The operator's name; for one of several results, the operator that returns them all."""
    while getattr(node.target, "__name__", "") == "getitem" and isinstance(node.args[0], Node):
        node = node.args[0]
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return str(schema.name.partition("::")[2])
    return str(getattr(node.target, "__name__", node.target))


def operation(node: Node) -> str:
    """The base name of the operator that a node calls; empty for other nodes."""
    return base_name(operator_of(node)) if node.op == "call_function" else ""


def calls(program: ExportedProgram) -> list[Node]:
    """The nodes that call an operator."""
    return [n for n in program.graph.nodes if n.op == "call_function"]


def is_float(node: Node) -> bool | None:
    """Whether the value of a node is a tensor of floats; None if it is no tensor."""
    value = node.meta.get("val")
    return value.is_floating_point() if isinstance(value, Tensor) else None


def nodes_in(argument: Any) -> list[Node]:
    """The nodes in an argument: itself, or those in a list."""
    items = argument if isinstance(argument, list | tuple) else [argument]
    return [item for item in items if isinstance(item, Node)]


def moved_from(node: Node) -> Node | None:
    """The node whose values `node` only moves; None if it computes values."""
    sources = nodes_in(node.args[0]) if operation(node) in MOVES_DATA else []
    return sources[0] if sources else None


def origin(node: Node) -> Node:
    """The node before all data movement that led to `node`."""
    while (source := moved_from(node)) is not None:
        node = source
    return node


def ancestors(node: Node, is_followed: Callable[[Node], bool]) -> set[Node]:
    """`node` and the nodes it is computed from, as far as each reader satisfies `is_followed`."""
    visited, waiting = {node}, [node]
    while waiting:
        reader = waiting.pop()
        new = set(reader.all_input_nodes) - visited if is_followed(reader) else ()
        visited.update(new)
        waiting += new
    return visited


def module_stack(node: Node) -> dict[str, tuple[str, str]]:
    """Path and class of the module calls around a node, outermost first, by call."""
    # the path of a module's second call ends in @1, and so on
    stack = node.meta.get("nn_module_stack") or {}
    return {key: entry for key, entry in stack.items() if isinstance(entry, tuple)}


def class_name(kind: object) -> str:
    """The class in an entry of a module stack, without its module."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def module_path(node: Node) -> str:
    """The path of the innermost module around a node; empty if there is none."""
    return next((str(path) for path, _ in reversed(module_stack(node).values())), "")


def module_of(node: Node) -> tuple[str, str]:
    """(path without the prefix of `FlatModel`, class name) of the innermost module around a
    node."""
    path, kind = next(reversed(module_stack(node).values()), ("", ""))
    return path.removeprefix("model").removeprefix("."), class_name(kind)


def place_of(node: Node) -> str:
    """The innermost module around a node, for messages."""
    return canonical_name(module_of(node)[0]) or "the model"


def used_placeholders(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that a node reads."""
    return {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}


def stored_tensors(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that are not inputs: parameters, buffers and constants."""
    specs = program.graph_signature.input_specs
    return {spec.arg.name for spec in specs if spec.kind is not InputKind.USER_INPUT}


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Parameter path by placeholder name, without the prefix of `FlatModel`."""
    # A tied weight has several placeholders, and all readers use one of them, chosen by
    # torch.export. It gets the name that comes first in the model.
    used = used_placeholders(program)
    specs = [s for s in program.graph_signature.input_specs if s.kind is InputKind.PARAMETER]
    address = {s.arg.name: program.state_dict[s.target].data_ptr() for s in specs}
    unused: dict[int, str] = {}  # by address of the parameter
    for spec in specs:
        if spec.arg.name not in used:
            unused.setdefault(address[spec.arg.name], str(spec.target))
    names = {}
    for spec in specs:
        name, path = spec.arg.name, str(spec.target)
        tied = unused.get(address[name], path) if name in used else path
        names[name] = tied.removeprefix("model.")
    return names


def buffer_names(program: ExportedProgram) -> dict[str, str]:
    """Buffer path by placeholder name, without the prefix of `FlatModel`."""
    return {
        s.arg.name: str(s.target).removeprefix("model.")
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.BUFFER
    }
