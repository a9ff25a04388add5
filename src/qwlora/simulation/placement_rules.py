"""Which values of a graph a simulation quantizes, and on which grids: schemes, rules and policies.
Does not import torch.

A policy is an ordered list of `PolicyRule`s; the first one that fits a value decides. A rule fits
by operator, module class, module path and a structural trait (`Trait`). `policies.yaml` has the
policies npu, matmul-inputs and weights-only.

The user's `PlacementRule`s come before the policy: they keep values float or change their grids.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import resources
from typing import Annotated, ClassVar, Literal

import yaml
from pydantic import PlainSerializer, PlainValidator, TypeAdapter

from qwlora.errors import CalibrationError, GridError
from qwlora.graph.value_traits import Decision, GridOptions, Trait
from qwlora.grid.scheme import BITWIDTHS, PerChannel, RangeEstimator, Scheme, as_estimator

# Whether to refuse a user's rule without effect in a graph; another graph of the job may need it.
UnusedRules = Literal["refuse", "allow"]

# pydantic cannot tell the classes of granularity apart
_Scheme = Annotated[Scheme, PlainValidator(Scheme.from_json), PlainSerializer(Scheme.to_json)]


@dataclass(frozen=True)
class PolicyRule:
    """One rule of a policy.

    Args:
        decision: decision for the values that fit. None: the rule only changes grids, and a later
            rule decides.
        reason: text for the placement log; `{owner}` is the class of the enclosing module that is
            one operation.
        operators: base names of operators; None fits all.
        module_class: a regular expression, searched in the class name of the innermost module.
        path: a glob over the module's path.
        trait: a trait that the value must have.
        bitwidth, symmetric: options of the grid. None: as in the simulation.
    """

    decision: Decision | None
    reason: str
    # a saved rule with other keys is of another version; ignoring them would change the policy
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    operators: frozenset[str] | None = None
    module_class: str | None = None
    path: str | None = None
    trait: Trait | None = None
    bitwidth: int | None = None
    symmetric: bool | None = None

    @property
    def options(self) -> GridOptions:
        return GridOptions(self.bitwidth, self.symmetric)

    def fits(self, operator: str, module_class: str, path: str, traits: frozenset[Trait]) -> bool:
        """Whether the rule decides about a value with these properties."""
        return (
            (self.trait is None or self.trait in traits)
            and (self.operators is None or operator in self.operators)
            and (not self.module_class or re.search(self.module_class, module_class) is not None)
            and (self.path is None or fnmatchcase(path, self.path))
        )


@dataclass(frozen=True)
class Policy:
    """Rules in order; the last must fit everything."""

    name: str
    rules: tuple[PolicyRule, ...]

    def __post_init__(self) -> None:
        last = self.rules[-1] if self.rules else None
        if last is None or last.decision is None or not last.fits("", "", "", frozenset()):
            raise CalibrationError(
                f"policy {self.name!r} must end with a rule for every value; add a rule without "
                "conditions"
            )


_FILE = resources.files("qwlora.simulation") / "policies.yaml"
POLICIES = {
    policy.name: policy
    for policy in TypeAdapter(list[Policy]).validate_python(yaml.safe_load(_FILE.read_text()))
}


@dataclass(frozen=True)
class PlacementRule:
    """A user's rule for the values that a glob matches; the first rule that fits decides.

    A value has three names: its module's path (`model.layers.0.self_attn`), the path with the
    operator (`model.layers.0.self_attn.softmax`), and the name of its encoding, where duplicates
    are numbered (`model.layers.0.self_attn.mul_1`). A weight has its module's path and its own
    (`lm_head`, `lm_head.weight`).

    Args:
        match: a glob (`*`, `?`, `[...]`) over these names.
        keep: `"float"` does not quantize the values. It has no effect on packed weights.
        bitwidth, symmetric: options of the grid. None: as in the simulation.
        minimum, maximum: fixed ends of the range, with zero between them. None: as observed.
        observer: how the range is chosen. None: as in the simulation.
        force: quantize matching values even where the policy does not.
        of: restrict the rule to activations or weights. None: `keep` applies to both, grid options
            to activations.

    Raises:
        GridError: the options contradict each other.
    """

    match: str
    keep: Literal["float"] | None = None
    bitwidth: int | None = None
    symmetric: bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    observer: str | RangeEstimator | None = None
    force: bool = False
    of: Literal["activations", "weights"] | None = None

    def __post_init__(self) -> None:
        keys = ("bitwidth", "symmetric", "minimum", "maximum", "observer")
        given = [key for key in keys if getattr(self, key) is not None]
        of_activations = [key for key in given if key not in ("bitwidth", "symmetric")]
        low, high = self.minimum or 0, self.maximum or 0
        problem = None
        if self.keep is not None and (given or self.force):
            problem = f"keep: float contradicts {', '.join(given or ['force'])}; remove one of them"
        elif self.keep is None and not given and not self.force:
            problem = (
                "it has no effect; add keep: float, bitwidth, symmetric, a range or an observer"
            )
        elif self.bitwidth is not None and self.bitwidth not in BITWIDTHS:
            problem = f"bitwidth {self.bitwidth} is not one of {BITWIDTHS[0]} to {BITWIDTHS[-1]}"
        elif not -math.inf < low <= 0 <= high < math.inf or (self.minimum, self.maximum) == (0, 0):
            problem = (
                f"the range {self.minimum} to {self.maximum} must be finite and contain zero and "
                "another value; omit an end that the data decides"
            )
        elif self.of == "weights" and of_activations:
            problem = (
                f"{', '.join(of_activations)} is for activations; the range of a weight comes from "
                "its values"
            )
        if problem:
            raise GridError(f"rule {self.match!r}: {problem}")
        if isinstance(self.observer, str):
            object.__setattr__(self, "observer", as_estimator(self.observer))

    @property
    def options(self) -> GridOptions:
        """Of the grid."""
        assert not isinstance(self.observer, str), "see __post_init__"
        return GridOptions(self.bitwidth, self.symmetric, self.minimum, self.maximum, self.observer)

    def is_for(self, weight: bool) -> bool:
        """Whether the rule applies to weights (`weight`) or to activations."""
        if self.of is None:
            return self.keep is not None or not weight
        return (self.of == "weights") is weight

    def fits(self, names: tuple[str, ...]) -> bool:
        """Whether the glob matches one of a value's names."""
        return any(fnmatchcase(name, self.match) for name in names)


@dataclass(frozen=True)
class Schemes:
    """Grids of activations and float weights, and the rules that place them.

    Vectors (norm weights, biases) are always quantized per tensor.

    Args:
        activations: scheme of activations; must be per tensor.
        adapter_weights: scheme of lora_A and lora_B.
        parameters: scheme of every other weight that step 1 left float, including an adapter's
            (`modules_to_save`, biases, DoRA magnitudes).
        quantize_residual_adds: quantize the residual stream too, for NPUs without float. In most
            language models a few channels are thousands of times larger than the rest, so even 16
            bits leave few steps for the others.
        policy: `npu`, `matmul-inputs`, `weights-only`, or a `Policy`.
        rules: tried before those of the policy.
        observer: how the range of an activation is chosen, see `RangeEstimator`.
        symmetric_matmul_second_input: give the second input of a product of two activations a
            symmetric grid. Qualcomm HTP requires it at 16 bits (AIMET applies the same exception
            when it is given an HTP configuration).
        unused_rules: refuse user rules without effect, or allow them; see
            `refuse_ineffective_rules`.
        key_value_bitwidth: bits of the keys and values of attention, on a symmetric grid, which is
            also the grid of the cache. None: like other activations.
        adapter_activation_bitwidth: bits of lora_A(x), lora_B(lora_A(x)) and its product with the
            scaling, but not of the sum with the base layer. None: like other activations.
    """

    activations: _Scheme = Scheme(16, symmetric=False)
    adapter_weights: _Scheme = Scheme(8, granularity=PerChannel(0))
    parameters: _Scheme = Scheme(16, granularity=PerChannel(0))
    quantize_residual_adds: bool = False
    policy: str | Policy = "npu"
    rules: Sequence[PlacementRule] = ()
    observer: str | RangeEstimator = "min-max"
    symmetric_matmul_second_input: bool = False
    unused_rules: UnusedRules = "refuse"
    key_value_bitwidth: int | None = None
    adapter_activation_bitwidth: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    def placement_policy(self) -> Policy:
        """The policy with a rule for each of the options above."""
        chosen = self.policy if isinstance(self.policy, Policy) else POLICIES.get(self.policy)
        if chosen is None:
            raise CalibrationError(
                f"placement policy {self.policy!r} is not one of {', '.join(POLICIES)}"
            )
        # inserted at the front, because the first rule that sets an option of the grid decides
        rules = [
            rule
            for rule in chosen.rules
            if not (self.quantize_residual_adds and rule.trait is Trait.RESIDUAL_ADDITION)
        ]
        if self.symmetric_matmul_second_input:
            rules.insert(0, PolicyRule(None, "", trait=Trait.MATMUL_SECOND_INPUT, symmetric=True))
        if (bits := self.adapter_activation_bitwidth) is not None:
            rules.insert(0, PolicyRule(None, "", trait=Trait.LORA_BRANCH, bitwidth=bits))
        if (bits := self.key_value_bitwidth) is not None:
            reason, trait = "keys or values that a cache holds", Trait.KEY_OR_VALUE
            cached = PolicyRule(Decision.QUANTIZE, reason, None, None, None, trait, bits, True)
            rules.insert(0, cached)
        return replace(chosen, rules=tuple(rules))
