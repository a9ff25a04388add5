"""Recipe section `simulation`: step 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwlora.export.npu.htp_limits import input_problem
from qwlora.grid.range_estimator import EstimatorName, RangeEstimator
from qwlora.grid.scheme import PerChannel, PerTensor, Scheme
from qwlora.recipe.section import Count, Section
from qwlora.simulation.placement_rules import PlacementRule


class AdapterWeights(Section):
    """The grid of lora_A and lora_B. There is no block granularity: blocks seldom divide a rank."""

    bitwidth: Annotated[int, Field(ge=4, le=16)] = Field(8, description="bits per weight")
    symmetric: bool = Field(True, description="fix the offset at the middle code")
    granularity: Literal["tensor", "channel"] = Field(
        "channel", description="one scale per tensor, or per row"
    )

    def scheme(self) -> Scheme:
        return Scheme(
            self.bitwidth,
            self.symmetric,
            PerChannel(0) if self.granularity == "channel" else PerTensor(),
        )


class SimulationRule(Section):
    """An exception for some values of the graph: keep them float, or give them another grid."""

    match: str = Field(
        description="glob over module paths, with an operator after the path where needed: "
        "lm_head, *.self_attn.softmax, *.lora_A.weight"
    )
    keep: Literal["float"] | None = Field(None, description="float: leave these values as they are")
    bitwidth: Annotated[int, Field(ge=2, le=16)] | None = Field(
        None, description="default: that of the simulation"
    )
    symmetric: bool | None = Field(None, description="default: that of the simulation")
    minimum: float | None = Field(
        None, description="fixed lower end of the range, whatever is observed"
    )
    maximum: float | None = Field(
        None, description="fixed upper end; a softmax may be fixed to 0 and 1"
    )
    observer: EstimatorName | None = Field(None, description="default: that of the simulation")
    force: bool = Field(
        False, description="quantize matching values even where the policy would not"
    )
    of: Literal["activations", "weights"] | None = Field(
        None,
        description="restrict the rule to activations or to weights. Default: a rule with keep "
        "applies to both, one with a grid to activations",
    )

    @model_validator(mode="after")
    def _possible(self) -> SimulationRule:
        self.placement_rule(RangeEstimator())
        return self

    def placement_rule(self, usual: RangeEstimator) -> PlacementRule:
        """The rule as `simulate` takes it; settings of its observer come from `usual`."""
        estimator = replace(usual, name=self.observer) if self.observer is not None else None
        return PlacementRule(**{**self.model_dump(), "observer": estimator})


class SimulationSection(Section):
    """Step 3: grids of activations and adapters."""

    policy: Literal["npu", "matmul-inputs", "weights-only"] = Field(
        "npu",
        description="npu: every computed value except norm internals, masks and residual "
        "additions; matmul-inputs: only what matrix products read; weights-only: no activations",
    )
    rules: list[SimulationRule] = Field(
        [], description="exceptions for some values; the first matching rule decides"
    )
    activation_bitwidth: Annotated[int, Field(ge=2, le=16)] = Field(
        16, description="bits of every activation. ONNX has 8 and 16"
    )
    activation_symmetric: bool = Field(
        False, description="fix the offset of activations at the middle code"
    )
    observer: EstimatorName = Field(
        "min-max",
        description="how an activation range is chosen; sqnr: least squared error, clipping weighs "
        "three times",
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.99, description="for observer percentile: share of the values inside the range"
    )
    calibration_tokens: Count | None = Field(
        None,
        description="stop calibration after this many tokens. Default: all of "
        "data.calibration_sequences",
    )
    unseen: Literal["error", "float"] = Field(
        "error",
        description="what to do with a value that no calibration data reached, such as an expert "
        "that no token chose",
    )
    residual_adds: Literal["float", "quantize"] = Field(
        "float",
        description="quantize: give x + f(x) an encoding, for NPUs without float. Costs accuracy: "
        "the residual stream has a wide range",
    )
    symmetric_matmul_second_input: bool = Field(
        False,
        description="give the second operand of an activation-by-activation product a "
        "symmetric grid; Qualcomm HTP needs it at 16 bits",
    )
    key_value_bitwidth: Literal[8, 16] | None = Field(
        None,
        description="bits of the keys and values of attention, on a symmetric grid, as a key-value "
        "cache on an NPU holds them. Default: those of other activations",
    )
    adapter_weights: AdapterWeights = Field(
        AdapterWeights(), description="grid of lora_A and lora_B"
    )
    adapter_activation_bitwidth: Annotated[int, Field(ge=2, le=16)] | None = Field(
        None,
        description="bits of what lora_A and lora_B compute, before it is added to the base "
        "layer's output. Default: those of other activations",
    )
    base_activations: Literal["all", "adapter_only", "none"] = Field(
        "all",
        description="encodings that change with the adapter, as QAIRT's quant_updatable_mode. all: "
        "every activation; adapter_only: lora_A, lora_B and their outputs; everything else, also "
        "the sum with the base layer's output, has one encoding for all adapters; none: one set "
        "for all adapters",
    )

    def htp_problems(self) -> Iterator[str]:
        """What keeps Qualcomm's HTP from running the simulation, with the key to change."""
        wanted = {
            "policy": "npu",
            "activation_bitwidth": 16,
            "residual_adds": "quantize",
            "symmetric_matmul_second_input": True,
            "key_value_bitwidth": 8,
            "base_activations": "none",
        }
        found = self.model_dump()
        for key, value in wanted.items():
            if found[key] != value:
                shown = str(value).lower() if isinstance(value, bool) else value
                yield f"set simulation.{key}: {shown}"
        if self.adapter_activation_bitwidth not in (None, 16):
            yield "set simulation.adapter_activation_bitwidth: 16"
        if (problem := input_problem(self.adapter_weights.scheme())) is not None:
            yield f"simulation.adapter_weights: {problem}"
        yield from self._kept_floats()

    def graph_problems(self) -> Iterator[str]:
        """What keeps values of a graph with a key-value cache float, with the key to change."""
        if self.policy != "npu":
            yield "set simulation.policy: npu"
        if self.residual_adds != "quantize":
            yield "set simulation.residual_adds: quantize"
        yield from self._kept_floats()

    def _kept_floats(self) -> Iterator[str]:
        for number, rule in enumerate(self.rules):
            if rule.keep is not None:
                yield f"simulation.rules.{number}: every value needs a grid; remove keep: float"

    def estimator(self) -> RangeEstimator:
        """How activation ranges are chosen."""
        return RangeEstimator(self.observer, self.percentile)

    def placement_rules(self) -> list[PlacementRule]:
        """The rules in the form that `simulate` takes."""
        return [rule.placement_rule(self.estimator()) for rule in self.rules]
