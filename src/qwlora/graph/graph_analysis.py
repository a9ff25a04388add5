"""Find the traits of the values in a captured graph (`value_traits.py`), and the values that belong
to an adapter.

Traits follow from the operators and the modules that ran them. No data is needed, and no
architecture is known by name.

    adapter     all values that an adapted layer computes outside its base layer: lora_A(x),
                lora_B(lora_A(x)), the scaling, the sum with base_layer(x), DoRA; `modules_to_save`
    base        base_layer(x), and all values between adapted layers
"""

from __future__ import annotations

import re
from collections.abc import Collection

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.graph.nodes import (
    MASKS,
    MATRIX_PRODUCTS,
    MOVES_DATA,
    SEVERAL_OPERATIONS,
    SOFTMAXES,
    ancestors,
    calls,
    class_name,
    is_float,
    module_path,
    module_stack,
    moved_from,
    nodes_in,
    operation,
    operator_of,
    origin,
    parameter_names,
    stored_tensors,
    used_placeholders,
)
from qwlora.graph.value_traits import Trait
from qwlora.system.parameter_names import is_adapter_name

# Class names of modules that are one operation in a runtime but several in torch. Their inner
# values are not quantized, unless the module runs a matrix product or a softmax.
_ONE_OPERATION = re.compile(r"(?i)Norm|RotaryEmbedding|RotaryPosition|GELU|SiLU|Swish|Activation")
# parameters of an adapter; the first group is the adapted layer
FACTOR = re.compile(r"(.*?)\.lora_\w+(?:\.|$)")
_OF_ADAPTER = re.compile(r"(.*?)\.(?:lora_\w+|modules_to_save)(?:\.|$)")


class GraphAnalysis:
    """The traits of the values of one program."""

    def __init__(self, program: ExportedProgram):
        self.program = program
        self.parameters = parameter_names(program)
        # stack keys of the modules that are several operations, whatever their names
        self._compound = {
            key
            for node in calls(program)
            if operation(node) in SEVERAL_OPERATIONS
            for key in module_stack(node)
        }
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        integers = {n.name for n in placeholders if is_float(n) is False}
        # embeddings are data, although they are looked up by integers
        integer_origins = computed_from(program, integers, frozenset({"embedding"}))
        fixed = stored_tensors(program)
        self._constants = computed_from(program, fixed)
        adapter = {name for name, path in self.parameters.items() if is_adapter_name(path)}
        self._of_adapter = self._constants - computed_from(program, fixed - adapter)
        self._adapted_weights = self._find_adapted_weights()
        multiplied, second = self._find_factors()
        factors = branch_nodes(program, FACTOR)
        self._names = {
            Trait.FLOAT64: {
                n.name
                for n in calls(program)
                if is_float(n) and n.meta["val"].dtype == torch.float64
            },
            Trait.INTEGER_ORIGIN: integer_origins - _moved_versions(program, multiplied),
            Trait.MASKED: _masked(program, integer_origins) - integer_origins,
            Trait.ANGLE: _angles(program) - self.parameters.keys(),
            Trait.ADAPTED_WEIGHT: _moved_versions(
                program, self._adapted_weights - {n.name for n in placeholders}
            ),
            # found by structure, whatever the modules are called: one addend comes from the other;
            # DoRA's x + f(x) is a layer's output, not a residual stream
            Trait.RESIDUAL_ADDITION: residual_additions(program) - factors,
            Trait.LORA_BRANCH: lora_branch(program),
            Trait.MATMUL_INPUT: multiplied,
            Trait.MATMUL_SECOND_INPUT: second,
            Trait.KEY_OR_VALUE: self._find_keys_and_values(),
            Trait.INPUT: set(program.graph_signature.user_inputs),
            Trait.ADAPTER_WEIGHT: adapter,
            Trait.PARAMETER: self.parameters.keys() - adapter,
            Trait.DATA_MOVEMENT: {n.name for n in calls(program) if operation(n) in MOVES_DATA},
        }

    def traits(self, node: Node) -> frozenset[Trait]:
        """All traits of the floating-point value of `node`."""
        traits = {trait for trait, names in self._names.items() if node.name in names}
        if owner := self.owner(node):
            outside = any(owner[0] not in module_stack(user) for user in node.users)
            traits.add(Trait.LEAVES_ONE_OPERATION if outside else Trait.INSIDE_ONE_OPERATION)
        return frozenset(traits)

    def owner(self, node: Node) -> tuple[str, str] | None:
        """(stack key, class name) of the outermost module around `node` that is one operation."""
        for key, (_, kind) in module_stack(node).items():
            if key not in self._compound and _ONE_OPERATION.search(class_name(kind)):
                return key, class_name(kind)
        return None

    def _find_adapted_weights(self) -> set[str]:
        """Names of the nodes between an adapter's weights and a product that reads W + BA as its
        weight."""
        adapted: set[str] = set()
        # a product of two weights, such as BA, does not count: it computes a later product's weight
        for node in reversed(calls(self.program)):
            factors = [source for factor in _factors(node) if is_float(source := origin(factor))]
            if any(factor.name not in self._constants for factor in factors):
                adapted.update(factor.name for factor in factors if factor.name in self._of_adapter)
            if node.name in self._of_adapter and any(user.name in adapted for user in node.users):
                adapted.add(node.name)
        return adapted

    def _find_factors(self) -> tuple[set[str], set[str]]:
        """Names of activations that matrix products read; names of those read as second factor."""
        multiplied, second = set[str](), set[str]()
        for node in calls(self.program):
            activations = [
                (i, source.name)
                for i, factor in enumerate(_factors(node))
                if factor.name not in self._constants and is_float(source := origin(factor))
                if source.name not in self._adapted_weights
            ]
            multiplied.update(name for _, name in activations)
            second.update(name for i, name in activations if i > 0 and len(activations) > 1)
        return multiplied, second

    def _find_keys_and_values(self) -> set[str]:
        """Names of the nodes whose values a key-value cache would hold, also in graphs without one.

        They are second factors of products of two activations. The search goes back from the
        product over data movement as long as each result has one reader, and returns the last node:

            linear -> view -> transpose -> matmul       linear
            linear -> split -> transpose -> matmul      split, as the queries are split off too
        """
        second: set[str] = set()
        for node in reversed(list(self.program.graph.nodes)):
            if node.users and all(_is_second_factor(node, user, second) for user in node.users):
                second.add(node.name)
        cached = set()
        for node in calls(self.program):
            activations = [f for f in _factors(node) if f.name not in self._constants]
            for factor in activations[1:]:
                source: Node | None = factor
                first = None
                while source is not None and source.name in second:
                    first = source if isinstance(source.meta.get("val"), Tensor) else first
                    source = moved_from(source)
                if first is not None and first.name not in self._adapted_weights:
                    cached.add(first.name)
        return cached


def lora_branch(program: ExportedProgram) -> set[str]:
    """Names of the nodes of the LoRA branches: lora_A(x), lora_B(lora_A(x)) and its scaling. The
    sum with the base layer's output is not included."""
    return branch_nodes(program, FACTOR) - {n.name for n in calls(program) if operation(n) == "add"}


def branch_nodes(program: ExportedProgram, pattern: re.Pattern[str] = _OF_ADAPTER) -> set[str]:
    """Names of the nodes of the active adapter: those of adapted layers without their base layers.
    Pattern `FACTOR` excludes `modules_to_save`."""
    used = used_placeholders(program)
    layers = {
        match[1]
        for s in program.graph_signature.input_specs
        if s.arg.name in used and is_adapter_name(str(s.target))
        if (match := pattern.match(str(s.target)))
    }
    return {
        node.name
        for node in calls(program)
        if (path := module_path(node)) in layers
        or ((match := pattern.match(path)) is not None and match[1] in layers)
    }


def residual_additions(program: ExportedProgram) -> set[str]:
    """Names of the nodes that compute `x + f(x)`."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    additions = set()
    for node in calls(program):
        operands = sorted(filter(_is_tensor, node.all_input_nodes), key=order.__getitem__)
        if operation(node) == "add" and len(operands) == 2 and operands[0].op == "call_function":
            x, added = operands
            # nothing before x was computed from it, so the walk ends there
            if x in ancestors(added, lambda n, x=x: order[n] > order[x]):  # type: ignore[misc]
                additions.add(node.name)
    return additions


def _angles(program: ExportedProgram) -> set[str]:
    """Names of the nodes that only sine and cosine read, directly or through other such nodes."""
    angles: set[str] = set()
    for node in reversed(program.graph.nodes):
        reads = [u.name in angles or operation(u) in ("sin", "cos") for u in node.users]
        if reads and all(reads):
            angles.add(node.name)
    return angles


def _masked(program: ExportedProgram, integer_origins: set[str]) -> set[str]:
    """Names of the nodes that apply a mask, and of the nodes between them and a softmax."""
    scores: set[str] = set()
    for node in reversed(calls(program)):
        if any(
            operation(user) in SOFTMAXES
            or (user.name in scores and operation(user) not in MATRIX_PRODUCTS)
            for user in node.users
        ):
            scores.add(node.name)
    masked, ends_scores = set[str](), MATRIX_PRODUCTS.keys() | SOFTMAXES
    for node in calls(program):
        sources, operator = node.all_input_nodes, operation(node)
        # masks are computed from integers: positions, and which tokens are padding
        meets_mask = any(s.name in integer_origins and _is_tensor(s) for s in sources)
        is_score = node.name in scores and operator not in ends_scores
        if (operator in MASKS and meets_mask) or (
            is_score and any(s.name in masked and s.name not in integer_origins for s in sources)
        ):
            masked.add(node.name)
    return masked


def computed_from(
    program: ExportedProgram, placeholders: Collection[str], stop_at: frozenset[str] = frozenset()
) -> set[str]:
    """Names of the nodes computed only from `placeholders` (included) and tensor sizes. Results of
    the operators in `stop_at` do not count."""
    computed = set(placeholders)
    for node in calls(program):
        from_computed = all(n.name in computed for n in node.all_input_nodes)
        is_size = isinstance(node.meta.get("val"), torch.SymInt | int)
        if is_size or (from_computed and operator_of(node) not in stop_at):
            computed.add(node.name)
    return computed


def _moved_versions(program: ExportedProgram, names: set[str]) -> set[str]:
    return {node.name for node in calls(program) if origin(node).name in names}


def _factors(node: Node) -> list[Node]:
    """The factors of a matrix product; empty for other operators."""
    positions = MATRIX_PRODUCTS.get(operation(node), ())
    return [a for p in positions if p < len(node.args) for a in nodes_in(node.args[p])]


def _is_second_factor(node: Node, user: Node, second: set[str]) -> bool:
    """Whether `user` reads `node` only as a second factor, directly or after data movement."""
    # an output may be the cache of the next call
    if user.op == "output":
        return True
    if factors := _factors(user):
        return node in factors[1:] and node is not factors[0]
    # a cache is an input of the model, to which `user` appends
    is_appended = operation(user) == "cat" and node.name != nodes_in(user.args[0])[0].name
    return user.name in second and (moved_from(user) is node or is_appended)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) and node.meta["val"].ndim > 0
