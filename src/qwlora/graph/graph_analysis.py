"""What the structure of a captured graph says about its values: the facts that placement rules ask for (`rules.Fact`).

Everything is found from the operators and the modules that ran them. No data is needed, and no architecture is known by name.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.graph.adapter_branch import factor_nodes
from qwlora.graph.aten_ops import (
    MASKS,
    MATRIX_PRODUCTS,
    MOVES_DATA,
    SEVERAL_OPERATIONS,
    SOFTMAXES,
    base_name,
    is_known,
)
from qwlora.graph.graph_parameters import module_stack, parameter_names
from qwlora.graph.value_facts import Fact
from qwlora.parameter_names import is_adapter_name


class GraphFacts:
    """Facts about the values of one program.

    Args:
        one_operation: a regular expression over class names, see `rules.Policy`.
    """

    def __init__(self, program: ExportedProgram, one_operation: str):
        self.program = program
        self.parameters = parameter_names(program)
        self._one_operation = re.compile(one_operation)
        # DoRA adds to a base layer's output what it computes from that, which makes it the layer's output and no residual stream
        self._residual_additions = residual_additions(program) - factor_nodes(program)
        integers = {
            n.name
            for n in _placeholders(program)
            if isinstance(n.meta.get("val"), Tensor) and not n.meta["val"].is_floating_point()
        }
        # what an embedding looks up is not an integer, whatever its table is made of
        self._integer_origins = _made_from_alone(
            program, integers, but_for=frozenset({"embedding"})
        )
        self._masked = _masked(program, self._integer_origins)
        self._angles = _angles(program)
        self._constants_given = {n.name for n in _placeholders(program)} - set(
            program.graph_signature.user_inputs
        )
        self._constants = _made_from_alone(program, self._constants_given)

    def facts(self, node: Node) -> frozenset[Fact]:
        """Every fact that holds for the floating point value of `node`."""
        if node.op == "placeholder":
            return frozenset(self._facts_of_placeholder(node))
        found = set()
        operator = operator_of(node)
        made = origin(node)
        multiplied = made is not None and Fact.MATMUL_INPUT in self._matmul_facts.get(
            made.name, set()
        )
        if node.meta["val"].dtype == torch.float64:
            found.add(Fact.FLOAT64)
        if node.name in self._integer_origins:
            found.update(() if multiplied else {Fact.INTEGER_ORIGIN})
        elif node.name in self._masked:
            found.add(Fact.MASKED)
        if owner := self.owner(node):
            outside = any(owner[0] not in module_stack(user) for user in node.users)
            found.add(Fact.LEAVES_ONE_OPERATION if outside else Fact.INSIDE_ONE_OPERATION)
        if node.name in self._angles:
            found.add(Fact.ANGLE)
        if made is not None and made.op == "call_function" and made.name in self._adapted_weights:
            found.add(Fact.ADAPTED_WEIGHT)
        if node.name in self._residual_additions:
            found.add(Fact.RESIDUAL_ADDITION)
        if not is_known(operator):
            found.add(Fact.UNKNOWN)
        return frozenset(found | self._matmul_facts.get(node.name, set()))

    def owner(self, node: Node) -> tuple[str, str] | None:
        """(stack key, class name) of the outermost enclosing module that is one operation."""
        for key, (_, kind) in module_stack(node).items():
            if key not in self._compound and self._one_operation.search(_class_name(kind)):
                return key, _class_name(kind)
        return None

    def _facts_of_placeholder(self, node: Node) -> set[Fact]:
        found = set(self._matmul_facts.get(node.name, set()))
        if (parameter := self.parameters.get(node.name)) is not None:
            found.add(Fact.ADAPTER_WEIGHT if is_adapter_name(parameter) else Fact.PARAMETER)
        elif node.name in self.program.graph_signature.user_inputs:
            found.update({Fact.INPUT, Fact.ANGLE} if node.name in self._angles else {Fact.INPUT})
        return found

    @cached_property
    def _compound(self) -> set[str]:
        """Stack keys of the modules that multiply matrices or attend."""
        return {
            key
            for n in _calls(self.program)
            if base_name(operator_of(n)) in SEVERAL_OPERATIONS
            for key in module_stack(n)
        }

    @cached_property
    def _adapted_weights(self) -> set[str]:
        """Names of the nodes that add an adapter's product to a weight, for a matrix product of that and an activation."""
        own = {name for name, parameter in self.parameters.items() if is_adapter_name(parameter)}
        made_of_adapter = self._constants - _made_from_alone(
            self.program, self._constants_given - own
        )
        found: set[str] = set()
        for node in reversed(_calls(self.program)):
            factors = [made for factor in _factors(node) if (made := origin(factor)) is not None]
            if any(factor.name not in self._constants for factor in factors):
                found.update(factor.name for factor in factors if factor.name in made_of_adapter)
            if node.name in made_of_adapter and any(user.name in found for user in node.users):
                found.add(node.name)
        return found

    @cached_property
    def _matmul_facts(self) -> dict[str, set[Fact]]:
        """By node: whether matrix products read it, and as what."""
        facts: dict[str, set[Fact]] = {}
        for node in _calls(self.program):
            activations = [
                (i, made)
                for i, factor in enumerate(_factors(node))
                if factor.name not in self._constants and (made := origin(factor)) is not None
            ]
            activations = [
                (i, made) for i, made in activations if made.name not in self._adapted_weights
            ]
            for i, made in activations:
                facts.setdefault(made.name, set()).add(Fact.MATMUL_INPUT)
                if i > 0 and len(activations) > 1:
                    facts[made.name].add(Fact.MATMUL_SECOND_INPUT)
        return facts


def origin(node: Node) -> Node | None:
    """The value that `node` was moved from; itself if it was not moved. None if that is an integer."""
    while (
        node.op == "call_function"
        and base_name(operator_of(node)) in MOVES_DATA
        and (sources := _nodes(node.args[0]))
    ):
        node = sources[0]
    value = node.meta.get("val")
    return node if isinstance(value, Tensor) and value.is_floating_point() else None


def _factors(node: Node) -> list[Node]:
    """What a matrix product multiplies; nothing of another operator."""
    positions = MATRIX_PRODUCTS.get(base_name(operator_of(node)), ())
    return [a for p in positions if p < len(node.args) for a in _nodes(node.args[p])]


def operator_of(node: Node) -> str:
    """The operator's name; one of several results of an operator goes by that operator."""
    producer = node
    while getattr(producer.target, "__name__", "") == "getitem" and isinstance(
        producer.args[0], Node
    ):
        producer = producer.args[0]
    schema = getattr(producer.target, "_schema", None)
    return (
        schema.name.partition("::")[2]
        if schema is not None
        else getattr(producer.target, "__name__", str(producer.target))
    )


def module_of(node: Node) -> tuple[str, str]:
    """(path, class name) of the innermost module that ran this node."""
    entries = list(module_stack(node).values())
    path, kind = entries[-1] if entries else ("", "")
    return path.removeprefix("model").removeprefix("."), _class_name(kind)


def residual_additions(program: ExportedProgram) -> set[str]:
    """Names of the nodes that compute `x + f(x)`: additions of two tensors, one of which the other was computed from."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    found = set()
    for node in _calls(program):
        if base_name(operator_of(node)) == "add":
            operands = sorted(
                (a for a in node.all_input_nodes if _is_tensor(a)), key=order.__getitem__
            )
            if (
                len(operands) == 2
                and operands[0].op == "call_function"
                and _flows_into(operands[0], operands[1], order)
            ):
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


def _angles(program: ExportedProgram) -> set[str]:
    """Names of the nodes all of whose readers are sines, cosines, or such nodes themselves."""
    found: set[str] = set()
    for node in reversed(program.graph.nodes):
        if node.users and all(
            n.name in found
            or (n.op == "call_function" and base_name(operator_of(n)) in ("sin", "cos"))
            for n in node.users
        ):
            found.add(node.name)
    return found


def _masked(program: ExportedProgram, integer_origins: set[str]) -> set[str]:
    """Names of the nodes that meet a mask, which is made of integers, and of what is computed from them on the way to a softmax."""
    scores: set[str] = set()
    for node in reversed(_calls(program)):
        if any(
            _operator_of_call(user) in SOFTMAXES
            or (user.name in scores and _operator_of_call(user) not in MATRIX_PRODUCTS)
            for user in node.users
        ):
            scores.add(node.name)
    found: set[str] = set()
    for node in _calls(program):
        operator = _operator_of_call(node)
        meets_mask = operator in MASKS and any(
            a.name in integer_origins and _is_tensor(a) for a in node.all_input_nodes
        )
        computed = (
            node.name in scores and operator not in MATRIX_PRODUCTS and operator not in SOFTMAXES
        )
        if meets_mask or (
            computed
            and any(a.name in found and a.name not in integer_origins for a in node.all_input_nodes)
        ):
            found.add(node.name)
    return found


def _made_from_alone(
    program: ExportedProgram, placeholders: set[str], but_for: frozenset[str] = frozenset()
) -> set[str]:
    """Names of the nodes that no values flow into but those of `placeholders`, these among them; results of the operators `but_for` are not followed.

    The size of a tensor is a number like any other, whatever the tensor holds.
    """
    found = set(placeholders)
    for node in _calls(program):
        computed = operator_of(node) not in but_for and all(
            n.name in found for n in node.all_input_nodes
        )
        if computed or isinstance(node.meta.get("val"), torch.SymInt | int):
            found.add(node.name)
    return found


def _operator_of_call(node: Node) -> str:
    """The operator's name without the underscore of its form that works in place; nothing of what is no call."""
    return base_name(operator_of(node)) if node.op == "call_function" else ""


def _placeholders(program: ExportedProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "placeholder"]


def _calls(program: ExportedProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function"]


def _nodes(argument: Any) -> list[Node]:
    """The nodes in an argument that is one, or a list of them."""
    return [
        a
        for a in (argument if isinstance(argument, list | tuple) else [argument])
        if isinstance(a, Node)
    ]


def _class_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim > 0
