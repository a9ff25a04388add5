"""How the model calls what is in a captured program: which placeholders are parameters, and which module ran a node."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Parameter path by placeholder name; the capture wrapper's own prefix is dropped.

    Of a tied weight, export lets all readers use one placeholder, whichever; it goes by the name under which the model has it first.
    """
    used = {n.name: bool(n.users) for n in program.graph.nodes if n.op == "placeholder"}
    specs = [
        spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER
    ]
    names: dict[str, str] = {}
    idle: dict[int, str] = {}
    for spec in specs:
        if not used[spec.arg.name]:
            idle.setdefault(program.state_dict[spec.target].data_ptr(), spec.target)
    for spec in specs:
        target = (
            idle.get(program.state_dict[spec.target].data_ptr(), spec.target)
            if used[spec.arg.name]
            else spec.target
        )
        names[spec.arg.name] = str(target).removeprefix("model.")
    return names


def buffer_names(program: ExportedProgram) -> dict[str, str]:
    """Buffer path by placeholder name, likewise."""
    return {
        s.arg.name: str(s.target).removeprefix("model.")
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.BUFFER
    }


def module_stack(node: Node) -> dict[str, tuple[str, str]]:
    """The calls of modules that a node lies in, outermost first: path and class by key. A path ends in `@1` and so on where a module runs again."""
    return {
        key: entry
        for key, entry in (node.meta.get("nn_module_stack") or {}).items()
        if isinstance(entry, tuple)
    }


def module_path(node: Node) -> str:
    """The path of the innermost module that ran a node; empty if none did."""
    return next((str(path) for path, _ in reversed(module_stack(node).values())), "")
