"""Recipe section `simulation`: step 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field

from qwlora.export.npu.htp_limits import input_problem
from qwlora.export.target import Target
from qwlora.grid.scheme import EstimatorName, PerChannel, PerTensor, RangeEstimator, Scheme
from qwlora.recipe.section import Count, Section
from qwlora.recipe.yaml_core import flow
from qwlora.simulation.placement_rules import PlacementRule

Bitwidth = Annotated[int, Field(ge=2, le=16)]


class AdapterWeights(Section):
    """The grid of lora_A and lora_B. There is no block granularity: blocks seldom divide a rank."""

    bitwidth: Annotated[int, Field(ge=4, le=16)] = 8
    """bits per weight"""
    symmetric: bool = True
    """fix the offset at the middle code"""
    granularity: Literal["tensor", "channel"] = "channel"
    """one scale per tensor, or per row"""

    def scheme(self) -> Scheme:
        return Scheme(
            self.bitwidth,
            self.symmetric,
            PerChannel(0) if self.granularity == "channel" else PerTensor(),
        )


class SimulationRule(Section):
    """An exception for some values of the graph: keep them float, or give them another grid."""

    match: str
    """glob over module paths, with an operator after the path where needed: lm_head,
    *.self_attn.softmax, *.lora_A.weight"""
    keep: Literal["float"] | None = None
    """float: leave these values as they are"""
    bitwidth: Bitwidth | None = None
    """default: that of the simulation"""
    symmetric: bool | None = None
    """default: that of the simulation"""
    minimum: float | None = None
    """fixed lower end of the range, whatever is observed"""
    maximum: float | None = None
    """fixed upper end; a softmax may be fixed to 0 and 1"""
    observer: EstimatorName | None = None
    """default: that of the simulation"""
    force: bool = False
    """quantize matching values even where the policy would not"""
    of: Literal["activations", "weights"] | None = None
    """restrict the rule to activations or to weights. Default: a rule with keep applies to both,
    one with a grid to activations"""

    def problems(self) -> Iterator[str]:
        try:
            self.placement_rule(RangeEstimator())
        except ValueError as error:
            yield str(error)

    def placement_rule(self, usual: RangeEstimator) -> PlacementRule:
        """The rule as `simulate` takes it; settings of its observer come from `usual`."""
        estimator = replace(usual, name=self.observer) if self.observer is not None else None
        return PlacementRule(**{**self.model_dump(), "observer": estimator})


class SimulationSection(Section):
    """Step 3: grids of activations and adapters."""

    policy: Literal["npu", "matmul-inputs", "weights-only"] = "npu"
    """npu: every computed value except norm internals, masks and residual additions; matmul-inputs:
    only what matrix products read; weights-only: no activations"""
    rules: list[SimulationRule] = []
    """exceptions for some values; the first matching rule decides"""
    activation_bitwidth: Bitwidth = 16
    """bits of every activation. ONNX has 8 and 16"""
    activation_symmetric: bool = False
    """fix the offset of activations at the middle code"""
    observer: EstimatorName = "min-max"
    """how an activation range is chosen; sqnr: least squared error, clipping weighs three times"""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """for observer percentile: share of the values inside the range"""
    calibration_tokens: Count | None = None
    """stop calibration after this many tokens. Default: all of data.calibration_sequences"""
    unseen: Literal["error", "float"] = "error"
    """what to do with a value that no calibration data reached, such as an expert that no token
    chose"""
    residual_adds: Literal["float", "quantize"] = "float"
    """quantize: give x + f(x) an encoding, for NPUs without float. Costs accuracy: the residual
    stream has a wide range"""
    symmetric_matmul_second_input: bool = False
    """give the second operand of an activation-by-activation product a symmetric grid; Qualcomm HTP
    needs it at 16 bits"""
    key_value_bitwidth: Literal[8, 16] | None = None
    """bits of the keys and values of attention, on a symmetric grid, as a key-value cache on an NPU
    holds them. Default: those of other activations"""
    adapter_weights: AdapterWeights = AdapterWeights()
    """grid of lora_A and lora_B"""
    adapter_activation_bitwidth: Bitwidth | None = None
    """bits of what lora_A and lora_B compute, before it is added to the base layer's output.
    Default: those of other activations"""
    base_activations: Literal["all", "adapter_only", "none"] = "all"
    """encodings that change with the adapter, as QAIRT's quant_updatable_mode. all: every
    activation; adapter_only: lora_A, lora_B and their outputs; everything else, also the sum with
    the base layer's output, has one encoding for all adapters; none: one set for all adapters"""

    def lacking(self, target: Target) -> Iterator[str]:
        """The keys to change for a target whose graphs have a key-value cache: all of their values
        need a grid, and one that Qualcomm's HTP has if it compiles them."""
        if not target.cached_graphs:
            return
        wanted: dict[str, object] = {"policy": "npu", "residual_adds": "quantize"}
        if target.compilers:
            wanted |= {
                "activation_bitwidth": 16,
                "symmetric_matmul_second_input": True,
                "key_value_bitwidth": 8,
                "base_activations": "none",
            }
            if self.adapter_activation_bitwidth is not None:
                wanted["adapter_activation_bitwidth"] = 16
            if (problem := input_problem(self.adapter_weights.scheme())) is not None:
                yield f"simulation.adapter_weights: {problem}"
        for key, value in wanted.items():
            if getattr(self, key) != value:
                yield f"set simulation.{key}: {flow(value)}"
        for number, rule in enumerate(self.rules):
            if rule.keep is not None:
                yield f"simulation.rules.{number}: every value needs a grid; remove keep: float"

    def activation_bitwidths(self) -> dict[str, int]:
        """Every bitwidth that activations can have, by the key that sets it."""
        bitwidths = {
            f"simulation.rules.{number}.bitwidth": rule.bitwidth
            for number, rule in enumerate(self.rules)
            if rule.bitwidth is not None and rule.of != "weights"
        }
        if self.policy == "weights-only":
            return bitwidths
        for key in ("adapter_activation_bitwidth", "activation_bitwidth"):
            if (bits := getattr(self, key)) is not None:
                bitwidths = {f"simulation.{key}": bits, **bitwidths}
        return bitwidths

    def estimator(self) -> RangeEstimator:
        """How activation ranges are chosen."""
        return RangeEstimator(self.observer, self.percentile)

    def placement_rules(self) -> list[PlacementRule]:
        """The rules in the form that `simulate` takes."""
        return [rule.placement_rule(self.estimator()) for rule in self.rules]
