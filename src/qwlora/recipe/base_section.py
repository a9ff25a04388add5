"""Recipe sections `model` and `base`: step 1."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from qwlora.export.target_compatibility import Grid
from qwlora.formats.model_source import locate
from qwlora.grid.scheme import Blocks, Granularity, PerChannel, PerTensor, Scheme, parse_scheme
from qwlora.quantize.solvers import SOLVERS, SolverName
from qwlora.recipe.section import Count, Name, NotNegative, Section, file, located

if TYPE_CHECKING:
    from qwlora.quantize.layer_rules import LayerRule

DEFAULT_BLOCK_SIZES = {"block": 32, "lpbq": 64}
Bitwidth = Literal[2, 3, 4, 5, 6, 7, 8]
GranularityName = Literal["tensor", "channel", "block", "lpbq"]
if TYPE_CHECKING:
    BaseSolver = str
else:
    BaseSolver = Literal[(*SOLVERS, "keep")]


class Model(Section):
    """The model to freeze."""

    source: Annotated[str, AfterValidator(partial(located, check=locate))]
    """a checkpoint folder, a .gguf file, package:NAME/PATH for a file inside an installed package,
    or a hub id (owner/name, owner/name/FILE.gguf)"""
    trust_remote_code: bool = False
    """run Python code from the model's folder, if its files name some (auto_map); whoever wrote it
    can then do whatever you can"""
    encodings: Annotated[str, file("the .encodings or .json file that AIMET wrote")] | None = None
    """an AIMET encodings file for the float weights in source; needs base.solver: keep"""
    keep_float: list[str] = []
    """with encodings: globs of parameters or layers that stay float, whether or not the file has an
    entry for them"""
    block_order: Literal["channel", "tensor"] | None = None
    """with encodings of version 1.0.0 from unknown producers: whether blocks are listed by output
    channel or in the order of the tensor"""


class Weights(Section):
    """The grid of the base's weights."""

    bitwidth: Bitwidth = 4
    """bits per weight"""
    symmetric: bool = True
    """true: the offset is fixed at the middle code; false: every scale has an offset of its own"""
    granularity: GranularityName = "block"
    """what one scale covers: the tensor, an output channel, or a block of inputs; lpbq: AIMET's
    low-power blocks, whose scales are small integers times a channel scale"""
    block_size: Count | None = None
    """inputs per block. Default: 32 for block, 64 for lpbq"""

    @model_validator(mode="before")
    @classmethod
    def _expand(cls, content: Any) -> Any:
        """Expand a short name to keys, so that the resolved recipe shows them and a rule can change
        one; fill in the default block size."""
        if isinstance(content, str):
            scheme, size = parse_scheme(content), None
            name = str(scheme.granularity)
            if isinstance(scheme.granularity, Blocks):
                name, size = scheme.granularity.kind, scheme.granularity.size
            content = {"bitwidth": scheme.bitwidth, "symmetric": scheme.symmetric}
            content |= {"granularity": name, "block_size": size}
        if isinstance(content, dict) and content.get("block_size") is None:
            default = DEFAULT_BLOCK_SIZES.get(str(content.get("granularity", "block")))
            return {**content, "block_size": default}
        return content

    def problems(self) -> Iterator[str]:
        yield from _size_problems(self)
        if self.granularity == "lpbq" and not self.symmetric:
            yield "granularity lpbq is always symmetric; remove symmetric: false, or use block"

    def scheme(self) -> Scheme:
        """The settings as a `Scheme`."""
        granularity: Granularity = PerTensor()
        if self.granularity == "channel":
            granularity = PerChannel(0)
        elif self.block_size is not None:
            granularity = Blocks.KINDS[self.granularity](self.block_size)
        return Scheme(self.bitwidth, self.symmetric, granularity)


def _size_problems(grid: Weights | BaseRule) -> Iterator[str]:
    if grid.granularity in ("tensor", "channel") and grid.block_size is not None:
        yield (
            f"block_size needs granularity block or lpbq, not {grid.granularity}; remove block_size"
        )


class BaseRule(Section):
    """An exception for some layers: keep them float, or give them another grid or solver."""

    match: str
    """glob over module paths: *.down_proj, model.layers.0.*, lm_head"""
    keep: Literal["float"] | None = None
    """float: leave these layers as they are"""
    solver: SolverName | None = None
    """default: the solver of base"""
    bitwidth: Bitwidth | None = None
    """default: that of base.weights"""
    symmetric: bool | None = None
    """default: that of base.weights"""
    granularity: GranularityName | None = None
    """default: that of base.weights"""
    block_size: Count | None = None
    """default: that of base.weights"""

    def problems(self) -> Iterator[str]:
        changes = list(self.model_dump(exclude={"match", "keep"}, exclude_none=True))
        if self.keep is not None and changes:
            yield f"keep: float excludes {', '.join(changes)}; remove one or the other"
        if self.keep is None and not changes:
            yield "the rule changes nothing; set keep: float, or a bitwidth, granularity or solver"
        yield from _size_problems(self)

    def scheme(self, base: Weights) -> Scheme | None:
        """The scheme for matching layers; None if they stay float."""
        if self.keep is not None:
            return None
        changes = self.model_dump(exclude={"match", "keep", "solver"}, exclude_none=True)
        whole = base.model_dump()
        if changes.get("granularity", whole["granularity"]) != whole["granularity"]:
            whole["block_size"] = None
        elif "block_size" in changes and whole["granularity"] in ("tensor", "channel"):
            whole["granularity"] = "block"
        return Weights(**whole | changes).scheme()


class Gptq(Section):
    """Settings of the gptq solver."""

    damping: Annotated[float, Field(gt=0)] = 0.01
    """added to the diagonal of the second moment, as a share of its mean"""
    activation_order: bool = False
    """quantize the columns with the largest inputs first; scales are then chosen beforehand"""
    sweeps: NotNegative = 2
    """passes of coordinate descent after GPTQ; each improves codes and scales one at a time. 4
    instead of 2 gains about 2 percent of layer error for half as much time again"""


class Tuning(Section):
    """Train scales and norms against the float model's logits.

    The float model stays in memory meanwhile.
    """

    steps: NotNegative = 0
    """number of tuning steps; one sequence per step, none repeated until all are used. 0 disables
    tuning; 512 takes 25 minutes for SmolLM2-135M on one core"""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-3
    """peak learning rate of AdamW, relative to the tuned value"""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the forward and backward pass; auto: bfloat16 if the processor has instructions
    for it, else float32"""


class Base(Section):
    """Step 1: the frozen integers."""

    solver: BaseSolver = "gptq"
    """gptq: minimizes the error of layer outputs on calibration text; search: range with the least
    squared weight error; sqnr: the same, clipping weighs three times; rtn: min-max range, rounded
    to nearest; keep: take the integers that the model files already hold"""
    weights: Weights = Weights()
    """grid of every Linear weight: a short name (w4-block32, w4-channel, w4-lpbq64, w3-block64,
    w8-channel, w2-block32-asymmetric) or the keys below"""
    rules: list[BaseRule] = []
    """exceptions for some layers; the first matching rule decides"""
    gptq: Gptq = Gptq()
    """settings of the gptq solver"""
    tuning: Tuning = Tuning()
    """train the scales of linear layers and the weights of norms together, after every layer is
    solved; codes do not change"""
    calibration_sequences: Count = 32
    """training sequences that gptq and init qera use, at most. Weights only: activation ranges have
    data.calibration_sequences"""
    calibrate_on: list[Name] = []
    """adapters whose text the base is calibrated on. Default: data.source, or the text of every
    adapter if that is not set"""

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
        grids = {Grid(self.weights.scheme(), self.solver): "base.weights"}
        for rule in self.rules:
            if (scheme := rule.scheme(self.weights)) is not None:
                grids.setdefault(Grid(scheme, rule.solver or self.solver), rule.match)
        return grids

    def problems(self) -> Iterator[str]:
        changes = list(self.model_dump(include={"weights", "rules", "gptq"}, exclude_defaults=True))
        changes += ["tuning"] if self.tuning.steps else []
        if self.solver == "keep" and changes:
            yield f"solver keep uses the integers unchanged; remove {' and '.join(changes)}"
