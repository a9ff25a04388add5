"""Recipe sections `model` and `base`: step 1."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from qwlora.export.target_compatibility import Grid
from qwlora.grid.scheme import Blocks, Granularity, PerChannel, PerTensor, Scheme, parse_scheme
from qwlora.quantize.solvers import SOLVERS, SolverName
from qwlora.recipe.section import Count, Name, Section

if TYPE_CHECKING:
    from qwlora.quantize.layer_rules import LayerRule

DEFAULT_BLOCK_SIZES = {"block": 32, "lpbq": 64}
GranularityName = Literal["tensor", "channel", "block", "lpbq"]
if TYPE_CHECKING:
    BaseSolver = str
else:
    BaseSolver = Literal[(*SOLVERS, "keep")]


class Model(Section):
    """The model to freeze."""

    source: str = Field(
        description="a checkpoint folder, a .gguf file, package:NAME/PATH for a file inside an "
        "installed package, or a hub id (owner/name, owner/name/FILE.gguf)"
    )
    trust_remote_code: bool = Field(
        False,
        description="run Python code from the model's folder, if its files name some (auto_map); "
        "whoever wrote it can then do whatever you can",
    )
    encodings: str | None = Field(
        None,
        description="an AIMET encodings file for the float weights in source; needs base.solver: "
        "keep",
    )
    keep_float: list[str] = Field(
        [],
        description="with encodings: globs of parameters or layers that stay float, whether or not "
        "the file has an entry for them",
    )
    block_order: Literal["channel", "tensor"] | None = Field(
        None,
        description="with encodings of version 1.0.0 from unknown producers: whether blocks are "
        "listed by output channel or in the order of the tensor",
    )


class Weights(Section):
    """The grid of the base's weights."""

    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="bits per weight")
    symmetric: bool = Field(
        True,
        description="true: the offset is fixed at the middle code; false: every scale has an "
        "offset of its own",
    )
    granularity: GranularityName = Field(
        "block",
        description="what one scale covers: the tensor, an output channel, or a block of inputs; "
        "lpbq: AIMET's low-power blocks, whose scales are small integers times a channel scale",
    )
    block_size: Count | None = Field(
        None, description="inputs per block. Default: 32 for block, 64 for lpbq"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, given: Any) -> Any:
        """Expand a short name to keys, so that the resolved recipe shows them and a rule can change
        one; fill in the default block size."""
        if isinstance(given, str):
            scheme, size = parse_scheme(given), None
            name = str(scheme.granularity)
            if isinstance(scheme.granularity, Blocks):
                name, size = scheme.granularity.kind, scheme.granularity.size
            given = {"bitwidth": scheme.bitwidth, "symmetric": scheme.symmetric}
            given |= {"granularity": name, "block_size": size}
        if isinstance(given, dict) and given.get("block_size") is None:
            default = DEFAULT_BLOCK_SIZES.get(str(given.get("granularity", "block")))
            return {**given, "block_size": default}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Weights:
        _check_block_size(self.granularity, self.block_size)
        if self.granularity == "lpbq" and not self.symmetric:
            raise ValueError(
                "granularity lpbq is always symmetric; remove symmetric: false, or use block"
            )
        return self

    def scheme(self) -> Scheme:
        """The settings as a `Scheme`."""
        granularity: Granularity = PerTensor()
        if self.granularity == "channel":
            granularity = PerChannel(0)
        elif self.block_size is not None:
            granularity = Blocks.KINDS[self.granularity](self.block_size)
        return Scheme(self.bitwidth, self.symmetric, granularity)


def _check_block_size(granularity: str | None, block_size: int | None) -> None:
    if granularity in ("tensor", "channel") and block_size is not None:
        raise ValueError(
            f"block_size needs granularity block or lpbq, not {granularity}; remove block_size"
        )


class BaseRule(Section):
    """An exception for some layers: keep them float, or give them another grid or solver."""

    match: str = Field(description="glob over module paths: *.down_proj, model.layers.0.*, lm_head")
    keep: Literal["float"] | None = Field(None, description="float: leave these layers as they are")
    solver: SolverName | None = Field(None, description="default: the solver of base")
    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8] | None = Field(
        None, description="default: that of base.weights"
    )
    symmetric: bool | None = Field(None, description="default: that of base.weights")
    granularity: GranularityName | None = Field(None, description="default: that of base.weights")
    block_size: Count | None = Field(None, description="default: that of base.weights")

    @model_validator(mode="after")
    def _changes_something(self) -> BaseRule:
        changes = self.model_dump(exclude={"match", "keep"}, exclude_none=True)
        given = list(changes)
        if self.keep is not None and given:
            raise ValueError(f"keep: float excludes {', '.join(given)}; remove one or the other")
        if self.keep is None and not given:
            raise ValueError(
                "the rule changes nothing; set keep: float, or a bitwidth, granularity or solver"
            )
        _check_block_size(self.granularity, self.block_size)
        return self

    def scheme(self, base: Weights) -> Scheme | None:
        """The scheme for matching layers; None if they stay float."""
        if self.keep is not None:
            return None
        keys = ("bitwidth", "symmetric", "granularity", "block_size")
        own = self.model_dump(include=set(keys), exclude_none=True)
        whole = base.model_dump()
        if own.get("granularity", whole["granularity"]) != whole["granularity"]:
            whole["block_size"] = None
        elif "block_size" in own and whole["granularity"] in ("tensor", "channel"):
            whole["granularity"] = "block"
        whole |= own
        return Weights(**whole).scheme()


class Gptq(Section):
    """Settings of the gptq solver."""

    damping: Annotated[float, Field(gt=0)] = Field(
        0.01, description="added to the diagonal of the second moment, as a share of its mean"
    )
    activation_order: bool = Field(
        False,
        description="quantize the columns with the largest inputs first; scales are then chosen "
        "beforehand",
    )
    sweeps: Annotated[int, Field(ge=0)] = Field(
        2,
        description="passes of coordinate descent after GPTQ; each improves codes and scales one "
        "at a time. 4 instead of 2 gains about 2 percent of layer error for half as much "
        "time again",
    )


class Tuning(Section):
    """Train scales and norms against the float model's logits.

    The float model stays in memory meanwhile.
    """

    steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="number of tuning steps; one sequence per step, none repeated until all are "
        "used. 0 disables tuning; 512 takes 25 minutes for SmolLM2-135M on one core",
    )
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = Field(
        3e-3, description="peak learning rate of AdamW, relative to the tuned value"
    )
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="precision of the forward and backward pass; auto: bfloat16 if the processor "
        "has instructions for it, else float32",
    )


class Base(Section):
    """Step 1: the frozen integers."""

    solver: BaseSolver = Field(
        "gptq",
        description="gptq: minimizes the error of layer outputs on calibration text; search: range "
        "with the least squared weight error; sqnr: the same, clipping weighs three "
        "times; rtn: min-max range, rounded to nearest; keep: take the integers that the "
        "model files already hold",
    )
    weights: Weights = Field(
        Weights(),
        description="grid of every Linear weight: a short name (w4-block32, w4-channel, w4-lpbq64, "
        "w3-block64, w8-channel, w2-block32-asymmetric) or the keys below",
    )
    rules: list[BaseRule] = Field(
        [], description="exceptions for some layers; the first matching rule decides"
    )
    gptq: Gptq = Field(Gptq(), description="settings of the gptq solver")
    tuning: Tuning = Field(
        Tuning(),
        description="train the scales of linear layers and the weights of norms together, after "
        "every layer is solved; codes do not change",
    )
    calibration_sequences: Count = Field(
        32,
        description="training sequences that gptq and init qera use, at most. Weights "
        "only: activation ranges have data.calibration_sequences",
    )
    calibrate_on: list[Name] = Field(
        [],
        description="adapters whose text the base is calibrated on. Default: data.source, or the "
        "text of every adapter if that is not set",
    )

    def layer_rules(self) -> list[LayerRule]:
        """The rules as `quantize_` takes them."""
        from qwlora.quantize.layer_rules import LayerRule

        return [
            LayerRule(rule.match, rule.scheme(self.weights), rule.solver) for rule in self.rules
        ]

    def grids(self) -> dict[Grid, str]:
        """The grids that are asked for, and for which layers; none with solver keep."""
        if self.solver == "keep":
            return {}
        found: dict[Grid, str] = {Grid(self.weights.scheme(), self.solver): "base.weights"}
        for rule in self.rules:
            if (scheme := rule.scheme(self.weights)) is not None:
                found.setdefault(Grid(scheme, rule.solver or self.solver), rule.match)
        return found

    @model_validator(mode="after")
    def _keep_is_alone(self) -> Base:
        given = list(self.model_dump(include={"weights", "rules", "gptq"}, exclude_defaults=True))
        if self.tuning.steps:
            given.append("tuning")
        if self.solver == "keep" and given:
            raise ValueError(
                f"solver keep uses the integers unchanged; remove {' and '.join(given)}"
            )
        return self
