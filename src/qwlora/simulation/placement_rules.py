"""Which values of a captured graph get a quantizer: rules, and policies made of them. Plain data; free of torch.

A policy is an ordered list of rules; the first that fits a value decides:

    quantize   the value gets an encoding
    share      it has none of its own: the encoding of the value that it was moved from holds it
    float      it stays as it is

A rule fits by the operator that made the value, the class of the module that ran it, a glob over its path, and one structural fact (`Fact`) about it. Three
policies come with the package:

    npu              every value that is made, but for those that no grid holds beside the rest: the inside of norms, masks, angles, residual additions
    matmul-inputs    what matrix products and convolutions read, and nothing else: integer kernels on a server
    weights-only     no activation

A `PlacementRule` is a user's: it stands in front of the policy, keeps values float or gives them another grid.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal

from qwlora.errors import CalibrationError, GridError
from qwlora.graph.aten_ops import MOVES_DATA, base_name
from qwlora.graph.value_facts import Fact
from qwlora.grid.range_estimator import Estimator, as_estimator
from qwlora.grid.scheme import BITWIDTHS

# Class names of modules that are one operation to a runtime and several to torch: their inside stays float.
ONE_OPERATION = r"(?i)Norm|RotaryEmbedding|RotaryPosition|GELU|SiLU|Swish|Activation"


IdleRules = Literal[
    "refuse", "allow"
]  # what becomes of a user's rule that does nothing in a graph: it may be for another graph of the same job


class Decision(StrEnum):
    """What becomes of a value."""

    QUANTIZE = "quantize"
    SHARE = "share"
    FLOAT = "float"


@dataclass(frozen=True)
class PolicyRule:
    """One rule of a policy.

    Args:
        decision: for the values that fit.
        reason: what `explain` says; `{owner}` stands for the class of the module that is one operation.
        operators: names of operators; None fits all.
        module_class: a regular expression, searched in the class name of the innermost module.
        path: a glob over the module's path.
        fact: a structural fact that must hold.
    """

    decision: Decision
    reason: str
    operators: frozenset[str] | None = None
    module_class: str | None = None
    path: str | None = None
    fact: Fact | None = None

    def fits(self, operator: str, module_class: str, path: str, facts: frozenset[Fact]) -> bool:
        """Whether the rule decides about a value of which this is known."""
        return (
            (self.fact is None or self.fact in facts)
            and (self.operators is None or base_name(operator) in self.operators)
            and (
                self.module_class is None or re.search(self.module_class, module_class) is not None
            )
            and (self.path is None or fnmatchcase(path, self.path))
        )


@dataclass(frozen=True)
class Policy:
    """Rules in order; the last must fit everything.

    Args:
        one_operation: a regular expression over class names: modules that are one operation, unless they multiply matrices or attend.
    """

    name: str
    rules: tuple[PolicyRule, ...]
    one_operation: str = ONE_OPERATION

    def __post_init__(self) -> None:
        last = self.rules[-1] if self.rules else None
        if last is None or (last.operators, last.module_class, last.path, last.fact) != (
            None,
            None,
            None,
            None,
        ):
            raise CalibrationError(
                f"policy {self.name!r} must end with a rule that fits every value, so that none is left undecided"
            )


_NOT_DATA = (
    PolicyRule(Decision.FLOAT, "float64 is index arithmetic", fact=Fact.FLOAT64),
    PolicyRule(Decision.FLOAT, "computed from integers alone", fact=Fact.INTEGER_ORIGIN),
    PolicyRule(Decision.FLOAT, "an angle: only sine and cosine read it", fact=Fact.ANGLE),
    PolicyRule(Decision.FLOAT, "combined with a mask", fact=Fact.MASKED),
    PolicyRule(
        Decision.FLOAT,
        "a weight that is made of weights, which have grids of their own",
        fact=Fact.ADAPTED_WEIGHT,
    ),
)
_ADAPTER = PolicyRule(Decision.QUANTIZE, "a weight of the adapter", fact=Fact.ADAPTER_WEIGHT)

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy(
            "npu",
            (
                _ADAPTER,
                PolicyRule(
                    Decision.QUANTIZE, "a parameter that step 1 left float", fact=Fact.PARAMETER
                ),
                *_NOT_DATA,
                PolicyRule(Decision.QUANTIZE, "an input of the model", fact=Fact.INPUT),
                PolicyRule(
                    Decision.FLOAT,
                    "inside {owner}, which is one operation",
                    fact=Fact.INSIDE_ONE_OPERATION,
                ),
                PolicyRule(Decision.QUANTIZE, "output of {owner}", fact=Fact.LEAVES_ONE_OPERATION),
                PolicyRule(Decision.FLOAT, "a residual addition", fact=Fact.RESIDUAL_ADDITION),
                PolicyRule(
                    Decision.SHARE,
                    "moves data; its input's encoding holds it",
                    operators=MOVES_DATA,
                ),
                PolicyRule(
                    Decision.QUANTIZE, "unknown: treated as making new values", fact=Fact.UNKNOWN
                ),
                PolicyRule(Decision.QUANTIZE, "makes new values"),
            ),
        ),
        Policy(
            "matmul-inputs",
            (
                _ADAPTER,
                PolicyRule(
                    Decision.FLOAT, "a parameter that step 1 left float", fact=Fact.PARAMETER
                ),
                *_NOT_DATA,
                PolicyRule(Decision.QUANTIZE, "a matrix product reads it", fact=Fact.MATMUL_INPUT),
                PolicyRule(
                    Decision.SHARE,
                    "moves data; its input's encoding holds it",
                    operators=MOVES_DATA,
                ),
                PolicyRule(
                    Decision.FLOAT, "unknown: treated as no matrix product", fact=Fact.UNKNOWN
                ),
                PolicyRule(Decision.FLOAT, "no matrix product reads it"),
            ),
        ),
        Policy(
            "weights-only",
            (
                _ADAPTER,
                PolicyRule(
                    Decision.FLOAT, "a parameter that step 1 left float", fact=Fact.PARAMETER
                ),
                PolicyRule(Decision.FLOAT, "no activation is quantized"),
            ),
        ),
    )
}


def policy(name: str) -> Policy:
    """The policy of this name.

    Raises:
        CalibrationError: there is none.
    """
    if name not in POLICIES:
        raise CalibrationError(f"placement policy {name!r} is not one of {', '.join(POLICIES)}")
    return POLICIES[name]


@dataclass(frozen=True)
class PlacementRule:
    """A user's rule about the values that a glob matches; the first rule that fits a value is the one that counts.

    A value has three names: its module's path (`model.layers.0.self_attn`), that with the operator (`model.layers.0.self_attn.softmax`), and the name of its
    encoding, which numbers equal ones (`model.layers.0.self_attn.mul_1`). A weight goes by its module's path and its own (`lm_head`, `lm_head.weight`).

    Args:
        match: a glob (`*`, `?`, `[...]`) over any of these.
        keep: `"float"` leaves the values float; a weight that step 1 made integers is not touched.
        bitwidth, symmetric: of the grid, in the place of the simulation's; None leaves that.
        minimum, maximum: fixed ends of the range, zero between them; None takes what is observed.
        observer: how the range is chosen, in the place of the simulation's.
        force: quantize what matches even where the policy would not. Without it a grid is for the values that the policy quantizes.
        of: only activations, or only weights. Unless given, `keep` is for both and a grid for activations.

    Raises:
        GridError: the parts contradict each other.
    """

    match: str
    keep: Literal["float"] | None = None
    bitwidth: int | None = None
    symmetric: bool | None = None
    minimum: float | None = None
    maximum: float | None = None
    observer: str | Estimator | None = None
    force: bool = False
    of: Literal["activations", "weights"] | None = None

    def __post_init__(self) -> None:
        if problem := self.problem():
            raise GridError(f"rule {self.match!r}: {problem}")
        if isinstance(self.observer, str):
            object.__setattr__(self, "observer", as_estimator(self.observer))

    def problem(self) -> str | None:
        """What is wrong with the rule, if anything."""
        given = [
            n
            for n in ("bitwidth", "symmetric", "minimum", "maximum", "observer")
            if getattr(self, n) is not None
        ]
        if self.keep is not None and (given or self.force):
            return f"a value that stays float has no {', '.join(given or ['force'])}; remove that, or keep"
        if self.keep is None and not given and not self.force:
            return "it changes nothing; give keep: float, or a bitwidth, symmetric, a range or an observer"
        if self.bitwidth is not None and self.bitwidth not in BITWIDTHS:
            return f"bitwidth {self.bitwidth} is not one of {BITWIDTHS[0]} to {BITWIDTHS[-1]}"
        if wrong := [
            n
            for n in ("minimum", "maximum")
            if (end := getattr(self, n)) is not None and not math.isfinite(end)
        ]:
            return f"{' and '.join(wrong)} must be finite; leave out what the data decides"
        if (
            (self.minimum or 0) > 0
            or (self.maximum or 0) < 0
            or (self.minimum, self.maximum) == (0, 0)
        ):
            return f"the range {self.minimum} to {self.maximum} must have zero in it, and something beside it"
        if self.of == "weights" and (
            of_activations := [n for n in given if n not in ("bitwidth", "symmetric")]
        ):
            return f"a weight's range comes from its values: {', '.join(of_activations)} is for activations"
        return None

    @property
    def reason(self) -> str:
        """What `explain` says."""
        return f"rule {self.match!r}"

    def is_for(self, weight: bool) -> bool:
        """Whether the rule speaks of weights, or of activations."""
        if self.of is None:
            return self.keep is not None or not weight
        return (self.of == "weights") is weight

    def fits(self, names: tuple[str, ...]) -> bool:
        """Whether one of a value's names matches."""
        return any(fnmatchcase(name, self.match) for name in names)
