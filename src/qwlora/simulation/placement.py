"""Placement: decide which values of a captured graph get a quantizer, on which grid, and why.

The first rule that fits a floating-point value decides: the user's `PlacementRule`s, then those of
the policy (`placement_rules.py`). `Placement.explanation` lists every computed value with the rule
that decided, `Placement.weights` every weight and input.

Names do not depend on decisions. The values of one module and operator are numbered in graph order,
data movement and inner values (masks, norm internals) after all others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from qwlora.errors import CalibrationError
from qwlora.graph.aten_ops import MOVES_DATA, base_name
from qwlora.graph.graph_analysis import GraphAnalysis, lora_branch, module_of, operator_of
from qwlora.graph.graph_parameters import buffer_names
from qwlora.graph.quantized_graph import Kind, Mark
from qwlora.graph.value_traits import Trait
from qwlora.grid.range_estimator import Estimator
from qwlora.messages import suggestion
from qwlora.parameter_names import canonical_name, parameter_name
from qwlora.simulation.placement_rules import (
    Decision,
    PlacementRule,
    Policy,
    UnusedRules,
    policy,
)

_NO_VALUE = "matches no value"
_INNER_VALUES = {Trait.FLOAT64, Trait.INTEGER_ORIGIN, Trait.MASKED, Trait.INSIDE_ONE_OPERATION}


@dataclass(frozen=True)
class Placed:
    """A value and the decision about it.

    Args:
        node: in the program's graph.
        name: of its encoding, if it has one.
        operator: that computed it; `weight` or `input` if none did.
    """

    node: str
    name: str
    operator: str
    module: str
    module_class: str
    decision: Decision
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """The names that a rule's glob matches; see `PlacementRule`."""
        return names_of_value(self.name, self.module, self.operator)


@dataclass(frozen=True)
class Overrides:
    """How the grid of a value differs from the simulation's; None: not at all."""

    bitwidth: int | None = None
    symmetric: bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    observer: Estimator | None = None


@dataclass(repr=False)
class Placement:
    """The values to quantize, their special grids, and the placement log.

    Args:
        overrides: by name of the mark.
        ruled: names of the marks that a user's rule decided about.
        unknown: number of occurrences of each unknown operator.
        unused_rules: why a user's rule has no effect, by its index.
    """

    marks: list[Mark] = field(default_factory=list)
    overrides: dict[str, Overrides] = field(default_factory=dict)
    ruled: set[str] = field(default_factory=set)
    explanation: list[Placed] = field(default_factory=list)
    weights: list[Placed] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    unused_rules: dict[int, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        counts = Counter(placed.decision.value for placed in (*self.explanation, *self.weights))
        return f"Placement of {counts.total()} values: " + ", ".join(
            f"{count} {decision}" for decision, count in counts.most_common()
        )

    def exclude(self, names: Collection[str], decision: Decision, reason: str) -> None:
        """Override the decision for these values: they get no encoding."""
        self.marks[:] = [mark for mark in self.marks if mark.name not in names]
        for placed in (self.explanation, self.weights):
            placed[:] = [
                replace(p, decision=decision, reason=reason) if p.name in names else p
                for p in placed
            ]


@dataclass(frozen=True)
class _Candidate:
    """A value to decide about."""

    node: Node
    name: str
    operator: str
    module: str
    module_class: str
    traits: frozenset[Trait]
    owner: str = ""
    kind: Kind = Kind.ACTIVATION

    @property
    def names(self) -> tuple[str, ...]:
        return names_of_value(self.name, self.module, self.operator)


def place(
    program: ExportedProgram,
    chosen: str | Policy = "npu",
    rules: Sequence[PlacementRule] = (),
    quantize_residual_adds: bool = False,
    symmetric_matmul_second_input: bool = False,
    input_names: Mapping[str, str] | None = None,
    unused_rules: UnusedRules = "refuse",
    key_value_bitwidth: int | None = None,
    adapter_activation_bitwidth: int | None = None,
) -> Placement:
    """Decide about every floating point value of `program`.

    Args:
        chosen: a policy, or its name.
        rules: the user's, tried before the policy's.
        quantize_residual_adds: quantize the residual stream too, for NPUs without float. In most
            language models a few channels are thousands of times larger than the rest, so that even
            16 bits leave few steps for the others.
        symmetric_matmul_second_input: give the second input of a product of two activations a
            symmetric grid. Qualcomm HTP requires it at 16 bits (AIMET applies the same exception
            when it is given an HTP configuration).
        input_names: names of the model's inputs by placeholder. Default: the placeholder's name.
        unused_rules: refuse user rules without effect, or allow them; see
            `refuse_ineffective_rules`.
        key_value_bitwidth: quantize the keys and values of attention to this many bits, with a
            symmetric grid: that of the cache in a graph with a cache, where they are read from.
            None: like other activations.
        adapter_activation_bitwidth: bits of what an adapter's factors compute: lora_A(x),
            lora_B(lora_A(x)) and its product with the scaling; not of the sum with the base layer.
            None: like other activations.

    Raises:
        CalibrationError: there is no such policy; or rules have no effect (all are named).
    """
    chosen = policy(chosen) if isinstance(chosen, str) else chosen
    if quantize_residual_adds:
        chosen = replace(
            chosen,
            rules=tuple(rule for rule in chosen.rules if rule.trait is not Trait.RESIDUAL_ADDITION),
        )
    analysis = GraphAnalysis(program, chosen.one_operation)
    placement = Placement()
    cached_values = analysis.keys_and_values if key_value_bitwidth is not None else set()
    of_factors = lora_branch(program) if adapter_activation_bitwidth is not None else set()
    candidates = list(_candidates(program, analysis, input_names or {}))
    decider = _Decider(chosen, rules)
    for candidate in candidates:
        decision, reason, ruled = decider.decide(candidate)
        overrides = ruled or Overrides()
        activation = candidate.kind is Kind.ACTIVATION
        cached = key_value_bitwidth is not None and candidate.node.name in cached_values
        if cached and ruled is None:
            decision, reason = Decision.QUANTIZE, "keys or values that a cache holds"
            overrides = Overrides(bitwidth=key_value_bitwidth, symmetric=True)
        if candidate.node.name in of_factors and overrides.bitwidth is None:
            overrides = replace(overrides, bitwidth=adapter_activation_bitwidth)
        if (
            activation
            and symmetric_matmul_second_input
            and Trait.MATMUL_SECOND_INPUT in candidate.traits
            and overrides.symmetric is None
        ):
            overrides = replace(overrides, symmetric=True)
        placed = Placed(
            candidate.node.name,
            candidate.name,
            candidate.operator,
            candidate.module,
            candidate.module_class,
            decision,
            reason,
        )
        (
            placement.explanation
            if activation and candidate.node.op == "call_function"
            else placement.weights
        ).append(placed)
        if Trait.UNKNOWN in candidate.traits:
            placement.unknown[candidate.operator] += 1
        if decision is Decision.QUANTIZE:
            placement.marks.append(Mark(candidate.node.name, candidate.name, candidate.kind))
            if ruled is not None:
                placement.ruled.add(candidate.name)
            if overrides != Overrides():
                placement.overrides[candidate.name] = overrides
    placement.unused_rules = decider.unused_rules(candidates)
    if unused_rules == "refuse":
        refuse_ineffective_rules([placement])
    return placement


def refuse_ineffective_rules(placements: Sequence[Placement]) -> None:
    """Check that each user rule has an effect in one of several graphs.

    Raises:
        CalibrationError: rules have no effect in any graph; all are named.
    """
    reasons = [placement.unused_rules for placement in placements]
    unused = [index for index in reasons[0] if all(index in each for each in reasons)]
    if unused:
        # of the reasons in several graphs, prefer one of a graph where the rule matches something
        problems = [
            min((each[index] for each in reasons), key=lambda why: _NO_VALUE in why)
            for index in unused
        ]
        raise CalibrationError(
            "\n  ".join([f"{len(problems)} placement rules have no effect:", *problems])
        )


class _Decider:
    """Applies the rules and records which of the user's rules have an effect."""

    def __init__(self, chosen: Policy, rules: Sequence[PlacementRule]):
        self.policy, self.rules = chosen, rules
        self.effective: set[int] = set()

    def decide(self, candidate: _Candidate) -> tuple[Decision, str, Overrides | None]:
        """Decision and reason; overrides if a user's rule decided, else None."""
        if candidate.kind is Kind.BASE:
            return Decision.QUANTIZE, "a packed weight of the base", None
        rule = next(
            r
            for r in self.policy.rules
            if r.fits(
                candidate.operator, candidate.module_class, candidate.module, candidate.traits
            )
        )
        decision, reason = rule.decision, rule.reason.format(owner=candidate.owner)
        for index, own in enumerate(self.rules):
            if not own.is_for(candidate.kind is not Kind.ACTIVATION) or not own.fits(
                candidate.names
            ):
                continue
            if own.keep is None and decision is not Decision.QUANTIZE and not own.force:
                continue
            self.effective.add(index)
            if own.keep is not None:
                return Decision.FLOAT, own.reason, Overrides()
            assert not isinstance(own.observer, str)
            return (
                Decision.QUANTIZE,
                f"{reason}; {own.reason}",
                Overrides(own.bitwidth, own.symmetric, own.minimum, own.maximum, own.observer),
            )
        return decision, reason, None

    def unused_rules(self, candidates: Sequence[_Candidate]) -> dict[int, str]:
        """The user's rules that decided about no value, and why."""
        return {
            i: f"{rule.match!r} {self._why(rule, candidates)}"
            for i, rule in enumerate(self.rules)
            if i not in self.effective
        }

    def _why(self, rule: PlacementRule, candidates: Sequence[_Candidate]) -> str:
        matched = [c for c in candidates if rule.fits(c.names)]
        if not matched:
            names = [name for candidate in candidates for name in candidate.names]
            return f"{_NO_VALUE}{suggestion(rule.match, names, 3)}"
        open_to = [
            c
            for c in matched
            if rule.is_for(c.kind is not Kind.ACTIVATION) and c.kind is not Kind.BASE
        ]
        if not open_to:
            first = matched[0].name
            if all(candidate.kind is Kind.BASE for candidate in matched):
                return f"matches only packed weights, {first} first; their grids cannot change"
            if rule.of is None:
                return f"matches only weights, {first} first; add of: weights"
            return f"matches no {rule.of}, but {first}; change of: {rule.of}"
        if rule.keep is None and not rule.force:
            return (
                f"matches nothing that policy {self.policy.name} quantizes and no earlier rule "
                "decides; force: true quantizes it anyway"
            )
        return "matches only values that an earlier rule decides; move it up, or remove it"


def names_of_value(name: str, module: str, operator: str) -> tuple[str, ...]:
    """The names that a rule's glob matches; see `PlacementRule`."""
    made = module and operator not in ("weight", "input")
    return tuple(n for n in (name, module, f"{module}.{operator}" if made else "") if n)


def _candidates(
    program: ExportedProgram, analysis: GraphAnalysis, input_names: Mapping[str, str]
) -> Iterator[_Candidate]:
    """Every floating-point parameter, input and computed value in graph order, with its name."""
    found = []
    buffers, weights = buffer_names(program), set[str]()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder":
            found += _graph_inputs(node, analysis, input_names.get(node.name, node.name))
        elif node.op == "call_function" and operator_of(node) == "dequantize":
            path, module_class = module_of(node)
            stored = parameter_name(buffers[node.args[0].name].removesuffix(".packed"))
            # a tied layer reads the codes of another layer
            name = stored if stored not in weights else parameter_name(path)
            weights.add(stored)
            found.append(
                _Candidate(
                    node,
                    name,
                    "weight",
                    name.rpartition(".")[0],
                    module_class,
                    frozenset(),
                    kind=Kind.BASE,
                )
            )
        elif node.op == "call_function":
            path, module_class = module_of(node)
            owner = analysis.owner(node)
            found.append(
                _Candidate(
                    node,
                    "",
                    operator_of(node),
                    canonical_name(path),
                    module_class,
                    analysis.traits(node),
                    owner[1] if owner else "",
                )
            )
    names = _numbered(found)
    for candidate in found:
        yield replace(candidate, name=names.get(candidate.node.name, candidate.name))


def _graph_inputs(node: Node, analysis: GraphAnalysis, input_name: str) -> list[_Candidate]:
    """The candidate of a placeholder: a parameter in use or an input, but not a buffer."""
    traits = analysis.traits(node)
    if (parameter := analysis.parameters.get(node.name)) is not None:
        kind = Kind.ADAPTER if Trait.ADAPTER_WEIGHT in traits else Kind.PARAMETER
        name = canonical_name(parameter)
        return (
            [_Candidate(node, name, "weight", name.rpartition(".")[0], "", traits, kind=kind)]
            if node.users
            else []
        )
    return [_Candidate(node, input_name, "input", "", "", traits)] if Trait.INPUT in traits else []


def _numbered(candidates: Sequence[_Candidate]) -> dict[str, str]:
    """The name of each computed value, by its node: `path.operator`, then `path.operator_1`, ..."""
    taken: Counter[str] = Counter()
    names = {}
    computed = [c for c in candidates if not c.name]
    for candidate in sorted(
        computed,
        key=lambda c: bool(c.traits & _INNER_VALUES) or base_name(c.operator) in MOVES_DATA,
    ):
        # the outermost module has no path
        stem = f"{candidate.module or 'output'}.{candidate.operator}"
        names[candidate.node.name] = f"{stem}_{taken[stem]}" if taken[stem] else stem
        taken[stem] += 1
    return names
