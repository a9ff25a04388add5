"""Placement: which values of a captured graph get a quantizer, on which grid, and why.

Every floating point value is decided about by the first rule that fits it: the user's rules (`rules.PlacementRule`) stand in front of those of a policy
(`rules.POLICIES`). `Placement.explanation` lists every computed value with the rule that decided, `Placement.weights` the same of weights and inputs.

Names do not depend on what was decided: among the values of one module and operator, those that are data in their own right are numbered first, in order of the
graph, and what only moves, or is the inside of something, after them.
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
from qwlora.graph.graph_analysis import GraphFacts, module_of, operator_of
from qwlora.graph.graph_parameters import buffer_names
from qwlora.graph.quantized_graph import Kind, Mark
from qwlora.graph.value_facts import Fact
from qwlora.grid.range_estimator import Estimator
from qwlora.messages import suggestion
from qwlora.parameter_names import canonical_name, parameter_name
from qwlora.simulation.placement_rules import (
    Decision,
    IdleRules,
    PlacementRule,
    Policy,
    policy,
)

_NO_VALUE = "matches no value"
_NOT_DATA = {Fact.FLOAT64, Fact.INTEGER_ORIGIN, Fact.MASKED, Fact.INSIDE_ONE_OPERATION}


@dataclass(frozen=True)
class Placed:
    """One value and what was decided about it.

    Args:
        node: in the program's graph.
        name: of its encoding, if it has one.
        operator: that made it; `weight` or `input` of what was not made.
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
        """What a rule's glob is matched with; see `rules.PlacementRule`."""
        return names_of_value(self.name, self.module, self.operator)


@dataclass(frozen=True)
class Overrides:
    """Where one value's grid differs from the simulation's; None is no difference."""

    bitwidth: int | None = None
    symmetric: bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    observer: Estimator | None = None


@dataclass
class Placement:
    """The marks of a graph, where their grids are special, and the reason for every value that has or has not got one.

    Args:
        overrides: by name of a mark.
        ruled: the marks that a user's rule decided about.
        unknown: how often each operator occurs that no rule knows.
        idle: the user's rules that do nothing, by their place among them, and why.
    """

    marks: list[Mark] = field(default_factory=list)
    overrides: dict[str, Overrides] = field(default_factory=dict)
    ruled: set[str] = field(default_factory=set)
    explanation: list[Placed] = field(default_factory=list)
    weights: list[Placed] = field(default_factory=list)
    unknown: Counter[str] = field(default_factory=Counter)
    idle: dict[int, str] = field(default_factory=dict)

    def take_out(self, names: Collection[str], decision: Decision, reason: str) -> None:
        """Leave the values of these names without encodings of their own, whatever was decided."""
        self.marks[:] = [mark for mark in self.marks if mark.name not in names]
        for placed in (self.explanation, self.weights):
            placed[:] = [
                replace(p, decision=decision, reason=reason) if p.name in names else p
                for p in placed
            ]


@dataclass(frozen=True)
class _Candidate:
    """A value that is to be decided about."""

    node: Node
    name: str
    operator: str
    module: str
    module_class: str
    facts: frozenset[Fact]
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
    idle_rules: IdleRules = "refuse",
) -> Placement:
    """Decide about every floating point value of `program`.

    Args:
        chosen: the policy, or the name of one.
        rules: the user's, tried before the policy's.
        quantize_residual_adds: give the residual stream encodings too. An NPU without float needs it; where a few channels of the stream are thousands of
            times larger than the rest, as in most language models, 16 bits then leave a few steps for everything else.
        symmetric_matmul_second_input: the second factor of a product of two activations gets a symmetric grid, as some runtimes need it.
        input_names: how the model's inputs are called, by placeholder; their own names unless given.
        idle_rules: whether rules of the user's that do nothing are refused, or for another graph (see `refuse_idle`).

    Raises:
        CalibrationError: there is no such policy; or rules do nothing (all are named, with near names).
    """
    chosen = policy(chosen) if isinstance(chosen, str) else chosen
    if quantize_residual_adds:
        chosen = replace(
            chosen,
            rules=tuple(rule for rule in chosen.rules if rule.fact is not Fact.RESIDUAL_ADDITION),
        )
    structure = GraphFacts(program, chosen.one_operation)
    placement = Placement()
    candidates = list(_candidates(program, structure, input_names or {}))
    decider = _Decider(chosen, rules)
    for candidate in candidates:
        decision, reason, ruled = decider.decide(candidate)
        overrides = ruled or Overrides()
        activation = candidate.kind is Kind.ACTIVATION
        if (
            activation
            and symmetric_matmul_second_input
            and Fact.MATMUL_SECOND_INPUT in candidate.facts
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
        if Fact.UNKNOWN in candidate.facts:
            placement.unknown[candidate.operator] += 1
        if decision is Decision.QUANTIZE:
            placement.marks.append(Mark(candidate.node.name, candidate.name, candidate.kind))
            if ruled is not None:
                placement.ruled.add(candidate.name)
            if overrides != Overrides():
                placement.overrides[candidate.name] = overrides
    placement.idle = decider.idle(candidates)
    if idle_rules == "refuse":
        refuse_idle([placement])
    return placement


def refuse_idle(placements: Sequence[Placement]) -> None:
    """Of rules for several graphs, each does something in one of them.

    Raises:
        CalibrationError: some do nothing in any; all are named.
    """
    everywhere = [
        index
        for index in placements[0].idle
        if all(index in placement.idle for placement in placements)
    ]
    if everywhere:  # what is matched in vain says more than that nothing is matched
        problems = [
            min(
                (placement.idle[index] for placement in placements),
                key=lambda why: _NO_VALUE in why,
            )
            for index in everywhere
        ]
        raise CalibrationError(
            "\n  ".join([f"{len(problems)} of the placement rules do nothing:", *problems])
        )


class _Decider:
    """The rules in order, and what became of each user's rule."""

    def __init__(self, chosen: Policy, rules: Sequence[PlacementRule]):
        self.policy, self.rules = chosen, rules
        self.effective: set[int] = set()

    def decide(self, candidate: _Candidate) -> tuple[Decision, str, Overrides | None]:
        """The decision about one value, the reason, and what a user's rule says of its grid, if one decided."""
        if candidate.kind is Kind.BASE:
            return Decision.QUANTIZE, "the integers of step 1", None
        rule = next(
            r
            for r in self.policy.rules
            if r.fits(candidate.operator, candidate.module_class, candidate.module, candidate.facts)
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

    def idle(self, candidates: Sequence[_Candidate]) -> dict[int, str]:
        """The user's rules that have decided about nothing, and why."""
        return {
            i: f"{rule.match!r} {self._why(rule, candidates)}"
            for i, rule in enumerate(self.rules)
            if i not in self.effective
        }

    def _why(self, rule: PlacementRule, candidates: Sequence[_Candidate]) -> str:
        matched = [c for c in candidates if rule.fits(c.names)]
        if not matched:
            return f"{_NO_VALUE}{suggestion(rule.match, [name for c in candidates for name in c.names], 3)}"
        open_to = [
            c
            for c in matched
            if rule.is_for(c.kind is not Kind.ACTIVATION) and c.kind is not Kind.BASE
        ]
        if not open_to:
            what = (
                "weights that step 1 made integers"
                if all(c.kind is Kind.BASE for c in matched)
                else "weights"
                if rule.of is None
                else f"no {rule.of}"
            )
            return f"matches {what} only, {matched[0].name} the first; of: weights is for the adapter's and for those left float"
        if rule.keep is None and not rule.force:
            return f"matches nothing that the policy {self.policy.name} quantizes, or only what an earlier rule decides about; force: true quantizes it anyway"
        return "matches only what an earlier rule decides about"


def names_of_value(name: str, module: str, operator: str) -> tuple[str, ...]:
    """What a rule's glob is matched with; see `rules.PlacementRule`."""
    made = module and operator not in ("weight", "input")
    return tuple(n for n in (name, module, f"{module}.{operator}" if made else "") if n)


def _candidates(
    program: ExportedProgram, structure: GraphFacts, input_names: Mapping[str, str]
) -> Iterator[_Candidate]:
    """Every floating point value that is a parameter, an input, or computed; in order of the graph, numbered."""
    found = []
    buffers, weights = buffer_names(program), set[str]()
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        if node.op == "placeholder":
            found += _outside(node, structure, input_names.get(node.name, node.name))
        elif node.op == "call_function" and operator_of(node) == "dequantize":
            path, module_class = module_of(node)
            stored = parameter_name(buffers[node.args[0].name].removesuffix(".packed"))
            name = (
                stored if stored not in weights else parameter_name(path)
            )  # a tied layer reads the codes of another
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
            owner = structure.owner(node)
            found.append(
                _Candidate(
                    node,
                    "",
                    operator_of(node),
                    canonical_name(path),
                    module_class,
                    structure.facts(node),
                    owner[1] if owner else "",
                )
            )
    names = _numbered(found)
    for candidate in found:
        yield replace(candidate, name=names.get(candidate.node.name, candidate.name))


def _outside(node: Node, structure: GraphFacts, input_name: str) -> list[_Candidate]:
    """A parameter, or a floating point input of the user, is a value. A buffer that is no parameter is a constant of the code, and stays."""
    facts = structure.facts(node)
    if (parameter := structure.parameters.get(node.name)) is not None:
        kind = Kind.ADAPTER if Fact.ADAPTER_WEIGHT in facts else Kind.PARAMETER
        name = canonical_name(parameter)
        return (
            [_Candidate(node, name, "weight", name.rpartition(".")[0], "", facts, kind=kind)]
            if node.users
            else []
        )
    return [_Candidate(node, input_name, "input", "", "", facts)] if Fact.INPUT in facts else []


def _numbered(candidates: Sequence[_Candidate]) -> dict[str, str]:
    """The name of each computed value, by its node: `path.operator`, then `path.operator_1`, ..."""
    taken: Counter[str] = Counter()
    names = {}
    computed = [c for c in candidates if not c.name]
    for candidate in sorted(
        computed, key=lambda c: bool(c.facts & _NOT_DATA) or base_name(c.operator) in MOVES_DATA
    ):
        stem = f"{candidate.module or 'output'}.{candidate.operator}"  # the outermost module has no path
        names[candidate.node.name] = f"{stem}_{taken[stem]}" if taken[stem] else stem
        taken[stem] += 1
    return names
