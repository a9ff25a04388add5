"""Placement: decide which values of a captured graph get a quantizer, on which grid, and why.

The first rule that fits a floating-point value decides: the user's `PlacementRule`s come first,
then the rules of the policy (`placement_rules.py`). The result lists every value with its rule.

The name of a value does not depend on the placement. Values of one module and operator are numbered
in graph order; data movement and inner values (masks, norm internals) come after all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from qwlora.errors import CalibrationError, suggestion
from qwlora.graph.graph_analysis import GraphAnalysis
from qwlora.graph.nodes import base_name, buffer_names, module_of, operation, operator_of
from qwlora.graph.quantized_graph import GraphValue, Kind
from qwlora.graph.value_traits import Decision, Trait
from qwlora.grid.encoding import Encoding
from qwlora.nn.packed_layer import packed_weights
from qwlora.simulation.placement_rules import PlacementRule, Policy, Schemes
from qwlora.system.parameter_names import canonical_name, parameter_name

_NUMBERED_LAST = {
    Trait.FLOAT64,
    Trait.INTEGER_ORIGIN,
    Trait.MASKED,
    Trait.INSIDE_ONE_OPERATION,
    Trait.DATA_MOVEMENT,
}
# Names of the parts that an adapter adds to a layer, after the layer's own name.
_LORA_PARTS = ["mul", "add", "lora_A.weight", "lora_A.linear", "lora_B.weight", "lora_B.linear"]


@dataclass(repr=False)
class Placement:
    """The floating-point values of a graph, in graph order.

    Args:
        policy: its name.
        unused_rules: the user's rules that have no effect, by index.
    """

    policy: str
    values: list[GraphValue]
    unused_rules: dict[int, PlacementRule] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = Counter(value.decision.value for value in self.values)
        return f"Placement of {counts.total()} values: " + ", ".join(
            f"{count} {decision}" for decision, count in counts.most_common()
        )

    @property
    def marks(self) -> list[GraphValue]:
        """The values that get an encoding."""
        return [value for value in self.values if value.decision is Decision.QUANTIZE]

    def base_encodings(self, model: nn.Module) -> dict[str, Encoding]:
        """Encodings of the packed weights of `model` that have a mark, by name."""
        # a module with several names: the graph may not have the first of `named_modules`
        packed = packed_weights(model, every_path=True)
        names = (mark.name for mark in self.marks if mark.kind is Kind.BASE)
        return {name: packed[name].encoding for name in names}

    def exclude(self, names: Collection[str], decision: Decision, reason: str) -> None:
        """Override the decision for these values: they get no encoding."""
        self.values[:] = [
            replace(value, decision=decision, reason=reason) if value.name in names else value
            for value in self.values
        ]

    def to_json(self) -> dict[str, Any]:
        """The log as JSON values."""
        return {"policy": self.policy, "values": [value.to_json() for value in self.values]}


def place(
    program: ExportedProgram, schemes: Schemes, input_names: Mapping[str, str] | None = None
) -> Placement:
    """Decide about every floating-point value of `program`. `input_names`: by placeholder."""
    policy, rules = schemes.placement_policy(), schemes.rules
    values = _graph_values(program, GraphAnalysis(program), input_names or {})
    decided = [_decided(value, policy, rules) for value in values]
    deciding = {value.rule for value in decided}
    unused = {index: rule for index, rule in enumerate(rules) if index not in deciding}
    placement = Placement(policy.name, decided, unused)
    if schemes.unused_rules == "refuse":
        refuse_ineffective_rules([placement])
    return placement


def refuse_ineffective_rules(placements: Sequence[Placement]) -> None:
    """Refuse user rules that have no effect in any of several graphs; the message lists them."""
    values = [value for placement in placements for value in placement.values]
    weights = {value.module for value in values if value.kind in (Kind.BASE, Kind.PARAMETER)}
    is_base = all(value.kind is not Kind.ADAPTER for value in values)
    # An adapter's schemes are also used for its base alone, whose graph lacks the adapter's values.
    of_adapters = tuple(f"{path}.{part}" for path in weights for part in _LORA_PARTS if is_base)
    problems = []
    for index, rule in placements[0].unused_rules.items():
        # a rule may be for one of several adapters
        if any(index not in placement.unused_rules for placement in placements):
            continue
        if rule.fits(of_adapters):
            continue
        if matched := [value for value in values if rule.fits(value.names)]:
            others = f" and {len(matched) - 1} more" if len(matched) > 1 else ""
            first = f"{matched[0].name} ({matched[0].reason})"
            problem = f"matches {first}{others}, but changes nothing"
        else:
            names = [name for value in values for name in value.names]
            problem = f"matches no value{suggestion(rule.match, names, 3)}"
        problems.append(f"{rule.match!r} {problem}")
    if problems:
        raise CalibrationError(
            "\n  ".join([f"{len(problems)} placement rules have no effect:", *problems])
            + "\nRemove them. Or move a rule before the one that decides; set of: weights or of: "
            "activations; or force: true for values that the policy does not quantize"
        )


def _decided(value: GraphValue, policy: Policy, rules: Sequence[PlacementRule]) -> GraphValue:
    if value.kind is Kind.BASE:
        return replace(value, reason="a packed weight of the base")
    fitting = [
        rule
        for rule in policy.rules
        if rule.fits(base_name(value.operator), value.module_class, value.module, value.traits)
    ]
    deciding = next(rule for rule in fitting if rule.decision is not None)
    decision, reason, options = deciding.decision, deciding.reason, deciding.options
    assert decision is not None
    reason = reason.format(owner=value.owner)
    for index, rule in enumerate(rules):
        is_placed = rule.keep is not None or rule.force or decision is Decision.QUANTIZE
        if is_placed and rule.is_for(value.kind is not Kind.ACTIVATION) and rule.fits(value.names):
            value, asked = replace(value, rule=index), f"rule {rule.match!r}"
            if rule.keep is not None:
                return replace(value, decision=Decision.FLOAT, reason=asked)
            decision, options, reason = Decision.QUANTIZE, rule.options, f"{reason}; {asked}"
            break
    for grid_rule in fitting:
        if grid_rule.decision is None:
            options = options.filled(grid_rule.options)
    return replace(value, decision=decision, reason=reason, options=options)


def _graph_values(
    program: ExportedProgram, analysis: GraphAnalysis, input_names: Mapping[str, str]
) -> Iterator[GraphValue]:
    """Every floating-point parameter, input and computed value that is read, in graph order."""
    values: list[GraphValue] = []
    buffers, stored_weights = buffer_names(program), set[str]()
    for node in program.graph.nodes:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not node.users:
            continue
        traits, owner = analysis.traits(node), analysis.owner(node)
        name, kind, operator = "", Kind.ACTIVATION, operator_of(node)
        path, module_class = module_of(node)
        module = canonical_name(path)
        if (parameter := analysis.parameters.get(node.name)) is not None:
            kind = Kind.ADAPTER if Trait.ADAPTER_WEIGHT in traits else Kind.PARAMETER
            name, operator = canonical_name(parameter), "weight"
            module = name.rpartition(".")[0]
        elif Trait.INPUT in traits:
            name, operator = input_names.get(node.name, node.name), "input"
        elif operation(node) == "dequantize":
            stored = parameter_name(buffers[node.args[0].name].removesuffix(".packed"))
            # a tied layer reads the codes of another layer
            name = stored if stored not in stored_weights else parameter_name(path)
            stored_weights.add(stored)
            kind, operator, module = Kind.BASE, "weight", name.rpartition(".")[0]
        elif node.op != "call_function":
            continue
        owner_class = owner[1] if owner else ""
        values.append(
            GraphValue(node.name, name, kind, operator, module, module_class, traits, owner_class)
        )
    names = _numbered(values)
    return (replace(value, name=value.name or names[value.node]) for value in values)


def _numbered(values: Sequence[GraphValue]) -> dict[str, str]:
    """The name of each computed value, by its node: `path.operator`, then `path.operator_1`, ..."""
    taken: Counter[str] = Counter()
    names = {}
    computed = [value for value in values if not value.name]
    for value in sorted(computed, key=lambda value: bool(value.traits & _NUMBERED_LAST)):
        # the outermost module has no path
        stem = f"{value.module or 'output'}.{value.operator}"
        names[value.node] = f"{stem}_{taken[stem]}" if taken[stem] else stem
        taken[stem] += 1
    return names
