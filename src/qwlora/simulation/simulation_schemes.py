"""What a simulation quantizes and on which grids; packed base weights already have theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from qwlora.graph.value_traits import Decision, Trait
from qwlora.grid.range_estimator import RangeEstimator
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.nn.fingerprint import adapter_fingerprint
from qwlora.simulation.placement_rules import (
    PlacementRule,
    Policy,
    PolicyRule,
    UnusedRules,
    policy,
)


@dataclass(frozen=True)
class Schemes:
    """Grids of activations and float weights, and the rules that place them.

    Vectors (norm weights, biases) are always quantized per tensor.

    Args:
        activations: must be per tensor.
        adapter_weights: lora_A and lora_B.
        parameters: every other weight that step 1 left float, including an adapter's
            (`modules_to_save`, biases, DoRA magnitudes).
        quantize_residual_adds: quantize the residual stream too, for NPUs without float. In most
            language models a few channels are thousands of times larger than the rest, so that even
            16 bits leave few steps for the others.
        policy: `npu`, `matmul-inputs`, `weights-only`, or a `Policy`.
        rules: tried before those of the policy.
        observer: how the range of an activation is chosen, see `RangeEstimator`.
        symmetric_matmul_second_input: give the second input of a product of two activations a
            symmetric grid. Qualcomm HTP requires it at 16 bits (AIMET applies the same exception
            when it is given an HTP configuration).
        unused_rules: refuse user rules without effect, or allow them; see
            `refuse_ineffective_rules`.
        key_value_bitwidth: quantize the keys and values of attention to this many bits, with a
            symmetric grid: that of the cache in a graph with a cache, where they are read from.
            None: like other activations.
        adapter_activation_bitwidth: bits of what an adapter's factors compute: lora_A(x),
            lora_B(lora_A(x)) and its product with the scaling; not of the sum with the base layer.
            None: like other activations.
    """

    activations: Scheme = Scheme(16, symmetric=False)
    adapter_weights: Scheme = Scheme(8, granularity=PerChannel(0))
    parameters: Scheme = Scheme(16, granularity=PerChannel(0))
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
        chosen = policy(self.policy) if isinstance(self.policy, str) else self.policy
        rules = list[PolicyRule]()
        if (bits := self.key_value_bitwidth) is not None:
            reason = "keys or values that a cache holds"
            rules.append(
                PolicyRule(
                    Decision.QUANTIZE,
                    reason,
                    trait=Trait.KEY_OR_VALUE,
                    bitwidth=bits,
                    symmetric=True,
                )
            )
        if (bits := self.adapter_activation_bitwidth) is not None:
            rules.append(PolicyRule(None, "", trait=Trait.LORA_BRANCH, bitwidth=bits))
        if self.symmetric_matmul_second_input:
            rules.append(PolicyRule(None, "", trait=Trait.MATMUL_SECOND_INPUT, symmetric=True))
        rules += [
            rule
            for rule in chosen.rules
            if not (self.quantize_residual_adds and rule.trait is Trait.RESIDUAL_ADDITION)
        ]
        return replace(chosen, rules=tuple(rules))


@dataclass(frozen=True)
class SimulationSource:
    """What a simulation was made from.

    Args:
        adapter_fingerprint: of the active adapter at that time; None if there was none, or for a
            zero adapter.
    """

    model: nn.Module
    example_inputs: Mapping[str, Any]
    schemes: Schemes
    adapter_fingerprint: str | None

    @classmethod
    def of(
        cls, model: nn.Module, example_inputs: Mapping[str, Any], schemes: Schemes
    ) -> SimulationSource:
        return cls(model, dict(example_inputs), schemes, adapter_fingerprint(model))
