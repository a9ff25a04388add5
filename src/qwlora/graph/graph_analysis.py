"""Find the traits of the values in a captured graph (`value_traits.py`).

They follow from the operators and the modules that ran them. No data is needed, and no architecture
is known by name.
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
from qwlora.graph.value_traits import Trait
from qwlora.parameter_names import is_adapter_name


class GraphAnalysis:
    """The traits of the values of one program.

    Args:
        one_operation: a regular expression over class names, see `Policy`.
    """

    def __init__(self, program: ExportedProgram, one_operation: str):
        self.program = program
        self.parameters = parameter_names(program)
        self._one_operation = re.compile(one_operation)
        # DoRA's x + f(x) is a layer's output, not a residual stream
        self._residual_additions = residual_additions(program) - factor_nodes(program)
        integers = {
            n.name
            for n in _placeholders(program)
            if isinstance(n.meta.get("val"), Tensor) and not n.meta["val"].is_floating_point()
        }
        # embeddings are data, although they are looked up by integers
        self._integer_origins = computed_from(program, integers, frozenset({"embedding"}))
        self._masked = _masked(program, self._integer_origins)
        self._lora_branch = lora_branch(program)
        self._angles = _angles(program)
        self._constant_inputs = {n.name for n in _placeholders(program)} - set(
            program.graph_signature.user_inputs
        )
        self._constants = computed_from(program, self._constant_inputs)

    def traits(self, node: Node) -> frozenset[Trait]:
        """All traits of the floating-point value of `node`."""
        found = {Trait.KEY_OR_VALUE} if node.name in self.keys_and_values else set()
        if node.op == "placeholder":
            return frozenset(found | self._placeholder_traits(node))
        operator = operator_of(node)
        made = origin(node)
        multiplied = made is not None and Trait.MATMUL_INPUT in self._matmul_traits.get(
            made.name, set()
        )
        if node.meta["val"].dtype == torch.float64:
            found.add(Trait.FLOAT64)
        if node.name in self._integer_origins:
            if not multiplied:
                found.add(Trait.INTEGER_ORIGIN)
        elif node.name in self._masked:
            found.add(Trait.MASKED)
        if owner := self.owner(node):
            outside = any(owner[0] not in module_stack(user) for user in node.users)
            found.add(Trait.LEAVES_ONE_OPERATION if outside else Trait.INSIDE_ONE_OPERATION)
        if node.name in self._angles:
            found.add(Trait.ANGLE)
        if made is not None and made.op == "call_function" and made.name in self._adapted_weights:
            found.add(Trait.ADAPTED_WEIGHT)
        if node.name in self._residual_additions:
            found.add(Trait.RESIDUAL_ADDITION)
        if node.name in self._lora_branch:
            found.add(Trait.LORA_BRANCH)
        if base_name(operator) in MOVES_DATA:
            found.add(Trait.DATA_MOVEMENT)
        if not is_known(operator):
            found.add(Trait.UNKNOWN)
        return frozenset(found | self._matmul_traits.get(node.name, set()))

    def owner(self, node: Node) -> tuple[str, str] | None:
        """(stack key, class name) of the outermost module around `node` that is one operation."""
        for key, (_, kind) in module_stack(node).items():
            if key not in self._compound and self._one_operation.search(_class_name(kind)):
                return key, _class_name(kind)
        return None

    def _placeholder_traits(self, node: Node) -> set[Trait]:
        found = set(self._matmul_traits.get(node.name, set()))
        if (parameter := self.parameters.get(node.name)) is not None:
            found.add(Trait.ADAPTER_WEIGHT if is_adapter_name(parameter) else Trait.PARAMETER)
        elif node.name in self.program.graph_signature.user_inputs:
            found.add(Trait.INPUT)
            if node.name in self._angles:
                found.add(Trait.ANGLE)
        return found

    @cached_property
    def keys_and_values(self) -> set[str]:
        """Names of the nodes whose values a key-value cache holds, also where there is no cache.

        They are second factors of products of two activations. A factor is moved before it is
        multiplied; the node is the first of its moves (or what they move) that nothing else reads:

            linear -> view -> transpose -> matmul       linear
            linear -> split -> transpose -> matmul      split, as the queries are split off too
        """
        second: set[str] = set()
        for node in reversed(list(self.program.graph.nodes)):
            if node.users and all(
                self._is_second_factor(node, user, second) for user in node.users
            ):
                second.add(node.name)
        found = set()
        for node in _calls(self.program):
            activations = [f for f in _factors(node) if f.name not in self._constants]
            for factor in activations[1:]:
                source: Node | None = factor
                first = None
                while source is not None and source.name in second:
                    first = source if isinstance(source.meta.get("val"), Tensor) else first
                    source = _moved(source)
                if first is not None and first.name not in self._adapted_weights:
                    found.add(first.name)
        return found

    def _is_second_factor(self, node: Node, user: Node, second: set[str]) -> bool:
        """Whether `user` reads `node` as a second factor only, at once or after moving it."""
        if user.op == "output":
            return True  # the cache of the next call
        factors = _factors(user)
        if factors:
            return node in factors[1:] and node is not factors[0]
        return user.name in second and (_moved(user) is node or _is_appended(node, user))

    @cached_property
    def _compound(self) -> set[str]:
        """Stack keys of the modules that run a matrix product, a softmax or a dequantize."""
        return {
            key
            for n in _calls(self.program)
            if base_name(operator_of(n)) in SEVERAL_OPERATIONS
            for key in module_stack(n)
        }

    @cached_property
    def _adapted_weights(self) -> set[str]:
        """Names of the nodes between an adapter's weights and a matrix product that uses them as a
        weight, such as W + BA."""
        own = {name for name, parameter in self.parameters.items() if is_adapter_name(parameter)}
        made_of_adapter = self._constants - computed_from(self.program, self._constant_inputs - own)
        found: set[str] = set()
        for node in reversed(_calls(self.program)):
            factors = [made for factor in _factors(node) if (made := origin(factor)) is not None]
            if any(factor.name not in self._constants for factor in factors):
                found.update(factor.name for factor in factors if factor.name in made_of_adapter)
            if node.name in made_of_adapter and any(user.name in found for user in node.users):
                found.add(node.name)
        return found

    @cached_property
    def _matmul_traits(self) -> dict[str, set[Trait]]:
        """By node name: MATMUL_INPUT and MATMUL_SECOND_INPUT."""
        found: dict[str, set[Trait]] = {}
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
                found.setdefault(made.name, set()).add(Trait.MATMUL_INPUT)
                if i > 0 and len(activations) > 1:
                    found[made.name].add(Trait.MATMUL_SECOND_INPUT)
        return found


def lora_branch(program: ExportedProgram) -> set[str]:
    """Names of the nodes of the LoRA branches: lora_A(x), lora_B(lora_A(x)) and the scaling of it,
    but not the sum with the base layer's output."""
    sums = {n.name for n in _calls(program) if _operator_of_call(n) == "add"}
    return factor_nodes(program) - sums


def origin(node: Node) -> Node | None:
    """The value before all data movement that led to `node`; None if it is not floating point."""
    while (
        node.op == "call_function"
        and base_name(operator_of(node)) in MOVES_DATA
        and (sources := _nodes(node.args[0]))
    ):
        node = sources[0]
    value = node.meta.get("val")
    return node if isinstance(value, Tensor) and value.is_floating_point() else None


def _moved(node: Node) -> Node | None:
    """The node whose values `node` only moves; None if it computes its own."""
    if node.op != "call_function" or base_name(operator_of(node)) not in MOVES_DATA:
        return None
    sources = _nodes(node.args[0])
    return sources[0] if sources else None


def _is_appended(node: Node, user: Node) -> bool:
    """Whether `user` appends `node` to an input of the model."""
    return base_name(operator_of(user)) == "cat" and node.name != _nodes(user.args[0])[0].name


def _factors(node: Node) -> list[Node]:
    """The factors of a matrix product; empty for other operators."""
    positions = MATRIX_PRODUCTS.get(base_name(operator_of(node)), ())
    return [a for p in positions if p < len(node.args) for a in _nodes(node.args[p])]


def operator_of(node: Node) -> str:
    """The operator's name; for one of several results, that of the operator that returns them."""
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
    """(path, class name) of the innermost module around this node."""
    entries = list(module_stack(node).values())
    path, kind = entries[-1] if entries else ("", "")
    return path.removeprefix("model").removeprefix("."), _class_name(kind)


def residual_additions(program: ExportedProgram) -> set[str]:
    """Names of the nodes that compute `x + f(x)`."""
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
    """Whether `target` was computed from `source`; nodes before `source` need no visit."""
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
    """Names of the nodes that only sine and cosine read, directly or through other such nodes."""
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
    """Names of the nodes that apply a mask (computed from integers), and of those from there to a
    softmax."""
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


def computed_from(
    program: ExportedProgram, placeholders: set[str], stop_at: frozenset[str] = frozenset()
) -> set[str]:
    """Names of the nodes computed from nothing but `placeholders` (included) and tensor sizes.

    Args:
        stop_at: operators whose results do not count.
    """
    found = set(placeholders)
    for node in _calls(program):
        computed = operator_of(node) not in stop_at and all(
            n.name in found for n in node.all_input_nodes
        )
        if computed or isinstance(node.meta.get("val"), torch.SymInt | int):
            found.add(node.name)
    return found


def _operator_of_call(node: Node) -> str:
    """The base name of a call's operator; empty for other nodes."""
    return base_name(operator_of(node)) if node.op == "call_function" else ""


def _placeholders(program: ExportedProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "placeholder"]


def _calls(program: ExportedProgram) -> list[Node]:
    return [n for n in program.graph.nodes if n.op == "call_function"]


def _nodes(argument: Any) -> list[Node]:
    """The nodes in an argument: itself, or those in a list."""
    return [
        a
        for a in (argument if isinstance(argument, list | tuple) else [argument])
        if isinstance(a, Node)
    ]


def _class_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rpartition(".")[2]


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim > 0
