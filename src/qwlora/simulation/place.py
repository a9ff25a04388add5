"""Placement: which values of a captured graph get a quantizer, by rules on (operator, module class).

Quantizing every operator's output destroys a transformer: the inside of a normalization squares values that a grid for the rest cannot hold. So a value is

    float     when it is not data at all: integers, masks, what is computed from integers alone
    float     a residual addition, unless asked otherwise: see `is_residual_add`
    float     inside a module whose class says that it is one operation (norms, activations, rotary tables): only what leaves it is quantized
    shared    when the operator only moves data: its input's grid already holds it
    quantized otherwise

Rules are tried in order and the first that fits decides. `explain` lists every value with the rule that decided.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from qwlora.grid.graph import Kind, Mark
from qwlora.grid.names import canonical_name, is_adapter_name, parameter_name


class Decision(StrEnum):
    """What becomes of a value."""

    QUANTIZE = "quantize"
    SHARE = "share"
    FLOAT = "float"


MOVES_DATA = frozenset(
    [
        "view",
        "reshape",
        "_unsafe_view",
        "transpose",
        "permute",
        "t",
        "expand",
        "expand_as",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "getitem",
        "flatten",
        "unflatten",
        "clone",
        "contiguous",
        "index",
        "index_select",
        "gather",
        "repeat",
        "narrow",
        "roll",
        "flip",
        "movedim",
        "to",
        "_to_copy",
    ]
)
MASKS = frozenset({"add", "where", "masked_fill", "mul"})
# One operation to a runtime, several to torch: class name patterns of modules whose inside stays float.
ONE_OPERATION = re.compile(r"Norm|RotaryEmbedding|RotaryPosition|GELU|SiLU|Swish|Activation", re.IGNORECASE)
# A module that multiplies matrices or attends is more than one operation, whatever its name.
SEVERAL_OPERATIONS = frozenset(
    "linear matmul bmm addmm baddbmm dequantize einsum softmax scaled_dot_product_attention convolution conv1d conv2d conv3d".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Placed:
    """One value and what was decided about it."""

    node: str
    operator: str
    module: str
    module_class: str
    decision: Decision
    reason: str


@dataclass
class Placement:
    """The marks of a graph, and the reason for every value that has or has not got one."""

    marks: list[Mark] = field(default_factory=list)
    explanation: list[Placed] = field(default_factory=list)


def place(program: ExportedProgram, quantize_residual_adds: bool = False) -> Placement:
    """Decide about every floating point value of `program`.

    Args:
        quantize_residual_adds: give the residual stream encodings too. An NPU without float needs it; where a few channels of the stream are thousands of
            times larger than the rest, as in most language models, 16 bits then leave a few steps for everything else.
    """
    placement = Placement()
    taken: dict[str, int] = {}
    parameters = _parameters(program)
    buffers = {s.arg.name: str(s.target).removeprefix("model.") for s in program.graph_signature.input_specs if s.kind is InputKind.BUFFER}
    weights: set[str] = set()
    origins = _integer_origins(program)
    compound = {key for n in program.graph.nodes if n.op == "call_function" and _operator(n) in SEVERAL_OPERATIONS for key in _stack(n)}
    residual = set() if quantize_residual_adds else residual_adds(program)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder":
            if mark := _mark_input(node, parameters.get(node.name), program):
                placement.marks.append(mark)
            continue
        if node.op != "call_function":
            continue
        operator = _operator(node)
        path, module_class = _module(node)
        if operator == "dequantize":
            stored = parameter_name(buffers[node.args[0].name].removesuffix(".packed"))
            name = stored if stored not in weights else parameter_name(path)  # a tied layer reads the codes of another
            weights.add(stored)
            placement.marks.append(Mark(node.name, name, Kind.BASE))
            continue
        decision, reason = _decide(node, operator, origins, residual, compound)
        placement.explanation.append(Placed(node.name, operator, canonical_name(path), module_class, decision, reason))
        if decision is Decision.QUANTIZE:
            placement.marks.append(Mark(node.name, _unique(f"{canonical_name(path)}.{operator}", taken), Kind.ACTIVATION))
    return placement


def _decide(node: Node, operator: str, integer_origin: set[str], residual: set[str], compound: set[str]) -> tuple[Decision, str]:
    value = node.meta["val"]
    if value.dtype == torch.float64:
        return Decision.FLOAT, "float64 is index arithmetic"
    if node.name in integer_origin:
        return Decision.FLOAT, "computed from integers alone"
    if operator in MASKS and any(isinstance(a, Node) and a.name in integer_origin and _is_tensor(a) for a in node.all_input_nodes):
        return Decision.FLOAT, "combined with a mask"
    owner = _one_operation_module(node, compound)
    if owner:
        leaves = any(owner[0] not in _stack(user) for user in node.users)
        if not leaves:
            return Decision.FLOAT, f"inside {owner[1]}, which is one operation"
        return Decision.QUANTIZE, f"output of {owner[1]}"
    if node.name in residual:
        return Decision.FLOAT, "a residual addition"
    if operator in MOVES_DATA:
        return Decision.SHARE, "moves data; its input's encoding holds it"
    return Decision.QUANTIZE, "makes new values"


def residual_adds(program: ExportedProgram) -> set[str]:
    """Names of the nodes that compute `x + f(x)`: additions of two tensors, one of which the other was computed from."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    found = set()
    for node in program.graph.nodes:
        if node.op == "call_function" and _operator(node) == "add":
            operands = sorted((a for a in node.all_input_nodes if _is_tensor(a)), key=order.__getitem__)
            if len(operands) == 2 and operands[0].op == "call_function" and _flows_into(operands[0], operands[1], order):
                found.add(node.name)
    return found


def _flows_into(source: Node, target: Node, order: dict[Node, int]) -> bool:
    """Whether `target` was computed from `source`; nodes before `source` cannot lie between."""
    waiting, seen = [target], {target}
    while waiting:
        for node in waiting.pop().all_input_nodes:
            if node is source:
                return True
            if order[node] > order[source] and node not in seen:
                seen.add(node)
                waiting.append(node)
    return False


def _mark_input(node: Node, parameter: str | None, program: ExportedProgram) -> Mark | None:
    """A parameter has an encoding; so has a floating point input of the user. Buffers that are not parameters are constants of the code, and stay."""
    if parameter is not None:
        kind = Kind.ADAPTER if is_adapter_name(parameter) else Kind.PARAMETER
        return Mark(node.name, canonical_name(parameter), kind) if node.users else None
    return Mark(node.name, node.name, Kind.ACTIVATION) if node.name in program.graph_signature.user_inputs else None


def _parameters(program: ExportedProgram) -> dict[str, str]:
    """Parameter path by placeholder name; the capture wrapper's own prefix is dropped.

    Of a tied weight, export lets all readers use one placeholder, whichever; it goes by the name under which the model has it first.
    """
    used = {n.name: bool(n.users) for n in program.graph.nodes if n.op == "placeholder"}
    specs = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.PARAMETER]
    names: dict[str, str] = {}
    idle: dict[int, str] = {}
    for spec in specs:
        if not used[spec.arg.name]:
            idle.setdefault(program.state_dict[spec.target].data_ptr(), spec.target)
    for spec in specs:
        target = idle.get(program.state_dict[spec.target].data_ptr(), spec.target) if used[spec.arg.name] else spec.target
        names[spec.arg.name] = str(target).removeprefix("model.")
    return names


def _integer_origins(program: ExportedProgram) -> set[str]:
    """Names of nodes that no values of a floating point input, parameter or buffer flow into; the size of one is an integer like any other."""
    found: set[str] = set()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor) and not value.is_floating_point():
                found.add(node.name)
        elif node.op == "call_function":
            computed = _operator(node) != "embedding" and all(n.name in found for n in node.all_input_nodes)
            if computed or isinstance(value, torch.SymInt | int):
                found.add(node.name)
    return found


def _stack(node: Node) -> dict[str, tuple[str, str]]:
    return {key: entry for key, entry in (node.meta.get("nn_module_stack") or {}).items() if isinstance(entry, tuple)}


def _module(node: Node) -> tuple[str, str]:
    """(path, class name) of the innermost module that ran this node."""
    entries = list(_stack(node).values())
    path, kind = entries[-1] if entries else ("", "")
    return path.removeprefix("model").removeprefix("."), _class_name(kind)


def _one_operation_module(node: Node, compound: set[str]) -> tuple[str, str] | None:
    """(stack key, class name) of the outermost enclosing module that counts as one operation."""
    for key, (_, kind) in _stack(node).items():
        if key not in compound and ONE_OPERATION.search(_class_name(kind)):
            return key, _class_name(kind)
    return None


def _class_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _operator(node: Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return schema.name.partition("::")[2] if schema is not None else getattr(node.target, "__name__", str(node.target))


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim > 0


def _unique(name: str, taken: dict[str, int]) -> str:
    """`name`, `name_1`, `name_2`, ... in order of the graph."""
    if name.startswith("."):  # computed in the outermost module, whose path is empty
        name = f"output{name}"
    count = taken.get(name, 0)
    taken[name] = count + 1
    return f"{name}_{count}" if count else name
