"""Nodes of a captured graph: their operators, their modules, and the tensors of the model they
read."""

from __future__ import annotations

from typing import Any

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from qwlora.graph.aten_ops import MOVES_DATA, base_name


def operator_of(node: Node) -> str:
    """The operator's name; for one of several results, that of the operator that returns them."""
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


def module_stack(node: Node) -> dict[str, tuple[str, str]]:
    """Path and class of the module calls around a node, outermost first, by call.

    The path of a module's second call ends in `@1`, and so on.
    """
    stack = node.meta.get("nn_module_stack") or {}
    return {key: entry for key, entry in stack.items() if isinstance(entry, tuple)}


def class_name(kind: object) -> str:
    """The class in an entry of a module stack, without its module."""
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def module_path(node: Node) -> str:
    """The path of the innermost module around a node; empty if there is none."""
    return next((str(path) for path, _ in reversed(module_stack(node).values())), "")


def module_of(node: Node) -> tuple[str, str]:
    """(path, class name) of the innermost module around a node, without the prefix of
    `FlatModel`."""
    path, kind = next(reversed(module_stack(node).values()), ("", ""))
    return path.removeprefix("model").removeprefix("."), class_name(kind)


def used_placeholders(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that a node reads."""
    return {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}


def stored_tensors(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that are no inputs: parameters, buffers and constants."""
    specs = program.graph_signature.input_specs
    return {spec.arg.name for spec in specs if spec.kind is not InputKind.USER_INPUT}


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Parameter path by placeholder name, without the prefix of `FlatModel`.

    torch.export uses an arbitrary one of the placeholders of a tied weight for all readers. It gets
    the name that comes first in the model.
    """
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
