"""Names from the model in a captured program: of parameters, buffers, and the modules of nodes."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node


def parameter_names(program: ExportedProgram) -> dict[str, str]:
    """Parameter path by placeholder name, without the prefix of `FlatModel`.

    torch.export uses an arbitrary one of the placeholders of a tied weight for all readers. It gets
    the name that comes first in the model.
    """
    used = {n.name: bool(n.users) for n in program.graph.nodes if n.op == "placeholder"}
    specs = [
        spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER
    ]
    names: dict[str, str] = {}
    unused: dict[int, str] = {}  # by address of the parameter
    for spec in specs:
        if not used[spec.arg.name]:
            unused.setdefault(program.state_dict[spec.target].data_ptr(), spec.target)
    for spec in specs:
        target = (
            unused.get(program.state_dict[spec.target].data_ptr(), spec.target)
            if used[spec.arg.name]
            else spec.target
        )
        names[spec.arg.name] = str(target).removeprefix("model.")
    return names


def buffer_names(program: ExportedProgram) -> dict[str, str]:
    """Buffer path by placeholder name, without the prefix of `FlatModel`."""
    return {
        s.arg.name: str(s.target).removeprefix("model.")
        for s in program.graph_signature.input_specs
        if s.kind is InputKind.BUFFER
    }


def module_stack(node: Node) -> dict[str, tuple[str, str]]:
    """Path and class of the module calls around a node, outermost first, by call.

    The path of a module's second call ends in `@1`, and so on.
    """
    return {
        key: entry
        for key, entry in (node.meta.get("nn_module_stack") or {}).items()
        if isinstance(entry, tuple)
    }


def module_path(node: Node) -> str:
    """The path of the innermost module around a node; empty if there is none."""
    return next((str(path) for path, _ in reversed(module_stack(node).values())), "")
