"""Step 3: the simulation."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, model_validator

from qwlora.grid.scheme import PerChannel, PerTensor, Scheme
from qwlora.recipe.section import Count, Section
from qwlora.simulation.observer_kind import Estimator
from qwlora.simulation.placement_rules import PlacementRule


class AdapterWeights(Section):
    """A grid for lora_A and lora_B. No blocks: they seldom divide a rank."""

    bitwidth: Annotated[int, Field(ge=4, le=16)] = Field(8, description="integer bits")
    symmetric: bool = Field(True, description="fix the offset at the middle code")
    granularity: Literal["tensor", "channel"] = Field(
        "channel", description="what one scale covers: the tensor, or a row"
    )

    def scheme(self) -> Scheme:
        return Scheme(
            self.bitwidth,
            self.symmetric,
            PerChannel(0) if self.granularity == "channel" else PerTensor(),
        )


class SimulationRule(Section):
    """Some values of the simulated graph: kept float, or on a grid of their own."""

    match: str = Field(
        description="a glob over module paths, and those with an operator: lm_head, *.self_attn.softmax, *.lora_A.weight"
    )
    keep: Literal["float"] | None = Field(None, description="float leaves the values as they are")
    bitwidth: Annotated[int, Field(ge=2, le=16)] | None = Field(
        None, description="the simulation's unless given"
    )
    symmetric: bool | None = Field(None, description="likewise")
    minimum: float | None = Field(
        None, description="the low end of the range, whatever is observed"
    )
    maximum: float | None = Field(
        None, description="the high end; a softmax may be pinned to 0 and 1"
    )
    observer: Literal["min-max", "percentile", "squared-error", "sqnr", "moving-average"] | None = (
        Field(None, description="the simulation's unless given")
    )
    force: bool = Field(False, description="quantize what matches even where the policy would not")
    of: Literal["activations", "weights"] | None = Field(
        None,
        description="what it speaks of; unless given, keep speaks of both and a grid of activations",
    )

    @model_validator(mode="after")
    def _possible(self) -> SimulationRule:
        self.placement_rule(Estimator())
        return self

    def placement_rule(self, usual: Estimator) -> PlacementRule:
        """The rule as `simulate` takes it, with the numbers of the simulation's estimator."""
        estimator = replace(usual, name=self.observer) if self.observer is not None else None
        return PlacementRule(**{**self.model_dump(), "observer": estimator})


class SimulationSection(Section):
    """Step 3."""

    policy: Literal["npu", "matmul-inputs", "weights-only"] = Field(
        "npu",
        description="npu: every value that is made, but for norms' inside, masks and residual additions; matmul-inputs: what matrix products read",
    )
    rules: list[SimulationRule] = Field(
        [], description="what is different for some values; the first that fits a value decides"
    )
    activation_bitwidth: Annotated[int, Field(ge=2, le=16)] = Field(
        16, description="bits of every activation; ONNX has 8 and 16"
    )
    activation_symmetric: bool = Field(
        False, description="fix the offset of activations at the middle code"
    )
    observer: Literal["min-max", "percentile", "squared-error", "sqnr", "moving-average"] = Field(
        "min-max",
        description="how an activation's range is chosen; sqnr: squared error with clipping weighing three times",
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(
        99.99, description="of observer percentile: the rest lies outside, on either side"
    )
    momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01, description="of observer moving-average: what the last batch weighs"
    )
    calibration_tokens: Count | None = Field(
        None, description="stop after this many; all of data.calibration_sequences unless given"
    )
    still_share: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="stop when no range has moved by more than this share for still_batches batches; never unless given",
    )
    still_batches: Count = Field(4, description="see still_share")
    unseen: Literal["error", "float"] = Field(
        "error",
        description="what to do with a value that no data came by for, like an expert that no token chose",
    )
    residual_adds: Literal["float", "quantize"] = Field(
        "float",
        description="whether x + f(x) gets an encoding; an NPU without float needs quantize",
    )
    symmetric_matmul_second_input: bool = Field(
        False,
        description="the second factor of two activations gets a symmetric grid, as some runtimes need it",
    )
    adapter_weights: AdapterWeights = Field(
        AdapterWeights(), description="the grid of lora_A and lora_B"
    )
    equalize: Literal["auto", "none", "diagonal", "hadamard"] = Field(
        "auto",
        description="other factors of the same product, for the adapter's grid; auto: of each layer those with the least error, its own among them",
    )
    base_activations: Literal["all", "adapter_only", "none"] = Field(
        "all",
        description="encodings that an adapter brings: all: of every activation; adapter_only: of its own values and weights, the base's activations having "
        "one set for all adapters; none: none at all",
    )

    def estimator(self) -> Estimator:
        """How ranges are chosen."""
        return Estimator(self.observer, self.percentile, self.momentum)

    def placement_rules(self) -> list[PlacementRule]:
        """The rules as `simulate` takes them."""
        return [rule.placement_rule(self.estimator()) for rule in self.rules]
