"""What a simulation quantizes and on which grids; packed base weights already have theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch.export import ExportedProgram

from qwlora.grid.range_estimator import Estimator
from qwlora.grid.scheme import PerChannel, Scheme
from qwlora.simulation.placement import Placement, place
from qwlora.simulation.placement_rules import PlacementRule, Policy, UnusedRules


@dataclass(frozen=True)
class SimulationSchemes:
    """Grids of activations and float weights, and the rules that place them.

    Vectors (norm weights, biases) are always quantized per tensor.

    Args:
        activations: must be per tensor.
        adapter_weights: lora_A and lora_B.
        parameters: every other weight that step 1 left float, including an adapter's
            (`modules_to_save`, biases, DoRA magnitudes).
        policy: `npu`, `matmul-inputs`, `weights-only`, or a `Policy`.
        rules: tried before those of the policy.
        observer: how the range of an activation is chosen, see `Estimator`.
        quantize_residual_adds, symmetric_matmul_second_input, unused_rules: see `place`.
        key_value_bitwidth, adapter_activation_bitwidth: see `place`.
    """

    activations: Scheme = Scheme(16, symmetric=False)
    adapter_weights: Scheme = Scheme(8, granularity=PerChannel(0))
    parameters: Scheme = Scheme(16, granularity=PerChannel(0))
    quantize_residual_adds: bool = False
    policy: str | Policy = "npu"
    rules: Sequence[PlacementRule] = ()
    observer: str | Estimator = "min-max"
    symmetric_matmul_second_input: bool = False
    unused_rules: UnusedRules = "refuse"
    key_value_bitwidth: int | None = None
    adapter_activation_bitwidth: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))

    def placement(self, program: ExportedProgram, input_names: Mapping[str, str]) -> Placement:
        """Apply `place` with these options."""
        return place(
            program,
            self.policy,
            self.rules,
            self.quantize_residual_adds,
            self.symmetric_matmul_second_input,
            input_names,
            self.unused_rules,
            self.key_value_bitwidth,
            self.adapter_activation_bitwidth,
        )

    @property
    def adapter_activations(self) -> Scheme:
        """The grid of what an adapter's factors compute."""
        bits = self.adapter_activation_bitwidth
        return self.activations if bits is None else replace(self.activations, bitwidth=bits)
