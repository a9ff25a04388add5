"""The model, and step 1: its weights as integers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.recipe.section import Count, Section

DEFAULT_BLOCK_SIZE = 32


class Model(Section):
    """Where the float model comes from."""

    source: str = Field(
        description="a checkpoint folder, a .gguf file, package:NAME/PATH inside an installed package, A+B+C for parts of one .gguf file, or a hub id"
    )
    trust_remote_code: bool = Field(
        False,
        description="run Python code from the model's folder, if its files name some (auto_map); "
        "whoever wrote it can then do whatever you can",
    )
    encodings: str | None = Field(
        None,
        description="an AIMET encodings file for the weights in source; base.solver keep takes them",
    )
    keep_float: list[str] = Field(
        [],
        description="with encodings: globs of parameters or layers that stay float though they have an entry, or have none",
    )
    block_order: Literal["channel", "tensor"] | None = Field(
        None,
        description="with encodings of version 1.0.0: how they list blocks, by output channel or as the tensor lies, where that cannot be known",
    )

    @model_validator(mode="after")
    def _about_encodings(self) -> Model:
        given = [
            name
            for name, value in (("keep_float", self.keep_float), ("block_order", self.block_order))
            if value
        ]
        if self.encodings is None and given:
            raise ValueError(
                f"{' and '.join(given)}: for reading encodings, which are not given; give model.encodings, or leave this out"
            )
        return self


class Weights(Section):
    """A grid for the base's weights."""

    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="integer bits")
    symmetric: bool = Field(
        True,
        description="fix the offset at the middle code; false gives each scale an offset of its own",
    )
    granularity: Literal["tensor", "channel", "block"] = Field(
        "block",
        description="what one scale covers: the tensor, an output channel, or a block of inputs",
    )
    block_size: Count | None = Field(
        None,
        description=f"inputs in a block, {DEFAULT_BLOCK_SIZE} unless given (granularity block only)",
    )

    @model_validator(mode="before")
    @classmethod
    def _block_size_where_there_are_blocks(cls, given: Any) -> Any:
        if (
            isinstance(given, dict)
            and given.get("granularity", "block") == "block"
            and given.get("block_size") is None
        ):
            return {**given, "block_size": DEFAULT_BLOCK_SIZE}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Weights:
        if self.granularity != "block" and self.block_size is not None:
            raise ValueError(
                f"block_size goes with granularity block, not {self.granularity}; remove one"
            )
        return self

    def scheme(self) -> Scheme:
        granularity: Granularity = PerTensor()
        if self.granularity == "channel":
            granularity = PerChannel(0)
        elif self.block_size is not None:
            granularity = PerBlock(self.block_size)
        return Scheme(self.bitwidth, self.symmetric, granularity)


class BaseRule(Section):
    """Some layers of the base: kept float, or with values of their own in the place of the base's."""

    match: str = Field(
        description="a glob over module paths: *.down_proj, model.layers.0.*, lm_head"
    )
    keep: Literal["float"] | None = Field(None, description="float leaves the layers as they are")
    solver: Literal["rtn", "search", "sqnr", "gptq"] | None = Field(
        None, description="the base's unless given"
    )
    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8] | None = Field(None, description="likewise")
    symmetric: bool | None = Field(None, description="likewise")
    granularity: Literal["tensor", "channel", "block"] | None = Field(None, description="likewise")
    block_size: Count | None = Field(None, description="likewise")

    @model_validator(mode="after")
    def _one_thing(self) -> BaseRule:
        given = [
            n
            for n in ("solver", "bitwidth", "symmetric", "granularity", "block_size")
            if getattr(self, n) is not None
        ]
        if self.keep is not None and given:
            raise ValueError(
                f"a layer that stays float has no {', '.join(given)}; remove that, or keep"
            )
        if self.keep is None and not given:
            raise ValueError(
                "the rule changes nothing; give keep: float, or a bitwidth, granularity or solver"
            )
        if self.granularity not in (None, "block") and self.block_size is not None:
            raise ValueError(
                f"block_size goes with granularity block, not {self.granularity}; remove one"
            )
        return self

    def scheme(self, base: Weights) -> Scheme | None:
        """The layers' grid; None if they stay float."""
        if self.keep is not None:
            return None
        own = {
            k: v
            for k in ("bitwidth", "symmetric", "granularity", "block_size")
            if (v := getattr(self, k)) is not None
        }
        if "block_size" in own:
            own["granularity"] = "block"
        whole = base.model_dump() | own
        if whole["granularity"] != "block":
            whole["block_size"] = None
        return Weights(**whole).scheme()


class Gptq(Section):
    """How gptq goes about it."""

    damping: Annotated[float, Field(gt=0)] = Field(
        0.01, description="share of the mean of diag R that is added to it"
    )
    activation_order: bool = Field(
        False,
        description="take the columns with the largest inputs first; scales are then chosen beforehand",
    )
    sweeps: Annotated[int, Field(ge=0)] = Field(
        2, description="passes afterwards, each of which improves codes and scales one at a time"
    )


class Tuning(Section):
    """Scales and norms that come near the float model together, after each layer was solved by itself. The float model is in memory meanwhile."""

    steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps of one training sequence each, every one another while there are some; 0 tunes nothing",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        3e-3, description="peak learning rate of AdamW, relative to what is tuned"
    )
    compute: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision of the forward and backward pass"
    )

    @model_validator(mode="after")
    def _something_to_do(self) -> Tuning:
        if not self.steps and (
            given := [
                n
                for n in ("learning_rate", "compute")
                if getattr(self, n) != Tuning.model_fields[n].default
            ]
        ):
            raise ValueError(
                f"{' and '.join(given)}: nothing is tuned without steps; give them, or remove tuning"
            )
        return self


class Base(Section):
    """Step 1."""

    solver: Literal["rtn", "search", "sqnr", "gptq", "keep"] = Field(
        "search",
        description="rtn: min-max range; search: the range with the least squared error; sqnr: the same, clipping counting more; gptq: following the inputs "
        "of each layer; keep: the integers that the model's files hold",
    )
    weights: Weights = Field(
        Weights(block_size=DEFAULT_BLOCK_SIZE), description="the grid of every Linear weight"
    )
    rules: list[BaseRule] = Field(
        [], description="what is different for some layers; the first that matches a layer decides"
    )
    gptq: Gptq = Field(Gptq(), description="for the layers that this solver quantizes")
    tuning: Tuning = Field(
        Tuning(),
        description="of linear layers' scales and norms' weights, when all are solved; no integer moves",
    )
    calibration_sequences: Count = Field(
        32, description="training sequences that gptq and the adapters' start follow, at most"
    )

    @model_validator(mode="after")
    def _nothing_beside_keep(self) -> Base:
        given = [
            n
            for n in ("weights", "rules", "gptq", "tuning")
            if getattr(self, n) != Base.model_fields[n].default
        ]
        if self.solver == "keep" and given:
            raise ValueError(
                f"solver keep takes the integers as they are; remove {' and '.join(given)}"
            )
        return self
