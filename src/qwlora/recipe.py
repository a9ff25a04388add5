"""The recipe: what a user asks for, in one YAML file, validated whole before torch is imported.

Each field's default and description are written once, here; `qwlora init` and the recipe reference print them. Validation gathers every problem: unknown keys
(with the nearest valid one), wrong types, values out of range, combinations that cannot work, and sources that are not there.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from qwlora.data import Columns, Cutting, Reading
from qwlora.errors import RecipeError, SourceError
from qwlora.grid.scheme import Granularity, PerBlock, PerChannel, PerTensor, Scheme
from qwlora.simulation.estimator import Estimator
from qwlora.simulation.rules import PlacementRule

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Count = Annotated[int, Field(ge=1)]
DEFAULT_BLOCK_SIZE = 32


class Section(BaseModel):
    """A part of the recipe; keys that it does not know are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Weights(Section):
    """A grid for the base's weights."""

    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8] = Field(4, description="integer bits")
    symmetric: bool = Field(True, description="fix the offset at the middle code; false gives each scale an offset of its own")
    granularity: Literal["tensor", "channel", "block"] = Field(
        "block", description="what one scale covers: the tensor, an output channel, or a block of inputs"
    )
    block_size: Count | None = Field(None, description=f"inputs in a block, {DEFAULT_BLOCK_SIZE} unless given (granularity block only)")

    @model_validator(mode="before")
    @classmethod
    def _block_size_where_there_are_blocks(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("granularity", "block") == "block" and given.get("block_size") is None:
            return {**given, "block_size": DEFAULT_BLOCK_SIZE}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> Weights:
        if self.granularity != "block" and self.block_size is not None:
            raise ValueError(f"block_size goes with granularity block, not {self.granularity}; remove one")
        return self

    def scheme(self) -> Scheme:
        granularity: Granularity = PerTensor()
        if self.granularity == "channel":
            granularity = PerChannel(0)
        elif self.block_size is not None:
            granularity = PerBlock(self.block_size)
        return Scheme(self.bitwidth, self.symmetric, granularity)


class AdapterWeights(Section):
    """A grid for lora_A and lora_B. No blocks: they seldom divide a rank."""

    bitwidth: Literal[4, 5, 6, 7, 8, 16] = Field(8, description="integer bits")
    symmetric: bool = Field(True, description="fix the offset at the middle code")
    granularity: Literal["tensor", "channel"] = Field("channel", description="what one scale covers: the tensor, or a row")

    def scheme(self) -> Scheme:
        return Scheme(self.bitwidth, self.symmetric, PerChannel(0) if self.granularity == "channel" else PerTensor())


class Model(Section):
    """Where the float model comes from."""

    source: str = Field(
        description="a checkpoint folder, a .gguf file, package:NAME/PATH inside an installed package, A+B+C for parts of one .gguf file, or a hub id"
    )
    encodings: str | None = Field(None, description="an AIMET encodings file for the weights in source; base.solver keep takes them")


class Data(Section):
    """What is learnt from, and how it is cut."""

    source: str = Field(
        description="a text, .jsonl, .csv, .tsv, .parquet or .arrow file, a folder of them or of datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a hub id"
    )
    split: str | None = Field(None, description="split of a dataset that has several; train unless given")
    subset: str | None = Field(None, description="configuration of a dataset on the hub that has several")
    text_column: str | None = Field(None, description="column of running text; columns named text, prompt and completion, or messages are found by themselves")
    prompt_column: str | None = Field(None, description="column of what is given to the model")
    completion_column: str | None = Field(None, description="column of what follows the prompt, and is learnt")
    messages_column: str | None = Field(None, description="column of conversations: lists of {role, content}, of which the assistant's are learnt")
    empty_records: Literal["error", "skip"] = Field("error", description="what to do with a record in which nothing is")
    chat_template: str | None = Field(None, description="a file with a chat template in Jinja, in place of the tokenizer's own")
    turns: Literal["together", "apart"] = Field("together", description="apart: each of the assistant's turns is a document that ends with it")
    packing: Literal["join", "documents", "none"] | None = Field(
        None,
        description="join: one after another, cut anywhere (running text, unless given); documents: whole ones side by side, blind for each other "
        "(anything else, unless given); none: one a sequence, padded",
    )
    sequence_tokens: Annotated[int, Field(ge=8)] = Field(512, description="tokens in a sequence, for training and evaluation alike")
    held_out: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="share of the text kept from training, split by document")
    evaluation_sequences: Count = Field(16, description="held-out sequences that perplexity is measured on, at most")
    calibration_sequences: Count = Field(8, description="training sequences that activation ranges are measured on, at most")

    @model_validator(mode="after")
    def _one_kind_of_columns(self) -> Data:
        pair = self.prompt_column or self.completion_column
        asked = [n for n, given in (("text_column", self.text_column), ("prompt_column", pair), ("messages_column", self.messages_column)) if given]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)}: a source is learnt from in one way; give one")
        return self

    def reading(self) -> Reading:
        """How the source is read."""
        columns = Columns(self.text_column, self.prompt_column, self.completion_column, self.messages_column)
        return Reading(columns, self.split, self.subset, self.empty_records == "skip")

    def cutting(self) -> Cutting:
        """How documents become sequences."""
        return Cutting(self.sequence_tokens, self.packing, self.turns)


class BaseRule(Section):
    """Some layers of the base: kept float, or with values of their own in the place of the base's."""

    match: str = Field(description="a glob over module paths: *.down_proj, model.layers.0.*, lm_head")
    keep: Literal["float"] | None = Field(None, description="float leaves the layers as they are")
    solver: Literal["rtn", "search", "sqnr", "gptq"] | None = Field(None, description="the base's unless given")
    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8] | None = Field(None, description="likewise")
    symmetric: bool | None = Field(None, description="likewise")
    granularity: Literal["tensor", "channel", "block"] | None = Field(None, description="likewise")
    block_size: Count | None = Field(None, description="likewise")

    @model_validator(mode="after")
    def _one_thing(self) -> BaseRule:
        given = [n for n in ("solver", "bitwidth", "symmetric", "granularity", "block_size") if getattr(self, n) is not None]
        if self.keep is not None and given:
            raise ValueError(f"a layer that stays float has no {', '.join(given)}; remove that, or keep")
        if self.keep is None and not given:
            raise ValueError("the rule changes nothing; give keep: float, or a bitwidth, granularity or solver")
        if self.granularity not in (None, "block") and self.block_size is not None:
            raise ValueError(f"block_size goes with granularity block, not {self.granularity}; remove one")
        return self

    def scheme(self, base: Weights) -> Scheme | None:
        """The layers' grid; None if they stay float."""
        if self.keep is not None:
            return None
        own = {k: v for k in ("bitwidth", "symmetric", "granularity", "block_size") if (v := getattr(self, k)) is not None}
        if "block_size" in own:
            own["granularity"] = "block"
        whole = base.model_dump() | own
        if whole["granularity"] != "block":
            whole["block_size"] = None
        return Weights(**whole).scheme()


class Base(Section):
    """Step 1."""

    solver: Literal["rtn", "search", "sqnr", "gptq", "keep"] = Field(
        "search",
        description="rtn: min-max range; search: the range with the least squared error; sqnr: the same, clipping counting more; gptq: following the inputs "
        "of each layer; keep: the integers that the model's files hold",
    )
    weights: Weights = Field(Weights(block_size=DEFAULT_BLOCK_SIZE), description="the grid of every Linear weight")
    rules: list[BaseRule] = Field([], description="what is different for some layers; the first that matches a layer decides")
    calibration_sequences: Count = Field(32, description="training sequences that gptq and the adapters' start follow, at most")

    @model_validator(mode="after")
    def _nothing_beside_keep(self) -> Base:
        given = [n for n in ("weights", "rules") if getattr(self, n) != Base.model_fields[n].default]
        if self.solver == "keep" and given:
            raise ValueError(f"solver keep takes the integers as they are; remove {' and '.join(given)}")
        return self


class Adapter(Section):
    """Step 2, for one adapter."""

    name: Name = Field(description="also the name of its folder")
    start: str | None = Field(
        None, description="an adapter to go on from, whose shape it takes: one that the recipe lists before this, or a PEFT adapter's folder or hub id"
    )
    objective: Literal["text", "recovery"] = Field("text", description="recovery: come near the float model besides, to be the start of others")
    unknown_base: Literal["refuse", "accept"] = Field("refuse", description="a start that does not say which base it was trained on, as PEFT saves them")
    rank: Count = Field(16, description="inner dimension of lora_B lora_A")
    alpha: Annotated[float, Field(gt=0)] = Field(32.0, description="the branch is scaled by alpha / rank")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="dropout before lora_A while training")
    target_modules: str | list[str] = Field("all-linear", description="which layers get an adapter, as PEFT understands it")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    init: Literal["zero", "svd", "qera"] = Field(
        "zero", description="start at zero, or at the best correction of what quantization lost: of the weights (svd), of the outputs (qera)"
    )
    rank_budget: Annotated[float, Field(gt=0)] | None = Field(
        None, description="ranks by layer: share of the parameters that rank has in the quantized layers, given to those that init corrects most"
    )
    rank_cap: Count | None = Field(None, description="the largest rank that rank_budget gives a layer, four times rank unless given")
    dora: bool = Field(False, description="DoRA: learn the norm of each output of a layer besides")
    rank_pattern: dict[str, Count] = Field({}, description="other ranks, by the end of a module's name or a regular expression")
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="other alphas, likewise")
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(None, description="numbers of the transformer layers that get an adapter; all unless given")
    steps: Annotated[int, Field(ge=0)] = Field(60, description="optimizer steps, at most; 0 with start uses that adapter as it is")
    batch_sequences: Count = Field(1, description="sequences in a forward pass, over all processes")
    accumulation_steps: Count = Field(1, description="forward passes in a step")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-4, description="peak learning rate of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field("cosine", description="how the learning rate moves")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(5, description="steps from zero to the peak learning rate")
    clip: Annotated[float, Field(ge=0)] = Field(1.0, description="largest norm of a step's gradient; 0 does not clip")
    compute: Literal["float32", "bfloat16"] = Field("float32", description="precision of the forward and backward pass; weights and optimizer stay float32")
    gradient_checkpointing: bool = Field(False, description="compute each layer again in the backward pass instead of keeping what is inside it")
    loss: Literal["chunked", "whole"] | None = Field(
        None, description="whole: the model's own loss, which makes the logits of the whole batch; chunked unless given, but with workflow qwa-lora"
    )
    evaluation_steps: Count | None = Field(None, description="steps between evaluations on held-out text; the best adapter is kept. None unless given")
    patience: Count | None = Field(None, description="evaluations without a better one after which training stops; needs evaluation_steps")
    range_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="learn the ranges of the base's activations too, at this rate, relative to their size (workflow qwa-lora). Fixed unless given"
    )
    report_to: list[str] = Field([], description="loggers, by their names in transformers: tensorboard, wandb, mlflow ...")
    checkpoint_steps: Count = Field(10, description="steps between checkpoints; an interrupted run goes on from the last")

    def without_graph(self) -> list[str]:
        """What of this cannot be trained through a captured graph, each with the way out."""
        problems = {
            "objective recovery watches layers, which do not run": self.objective == "recovery",
            "dropout is not in a graph of evaluation; set it to 0": self.dropout > 0,
            "gradient_checkpointing needs layers that run; leave it out": self.gradient_checkpointing,
            "compute bfloat16 cannot hold the steps of the grids; use float32": self.compute == "bfloat16",
            "loss chunked needs an output head outside the graph; use whole": self.loss == "chunked",
        }
        return [f"adapter {self.name}: {problem}" for problem, is_there in problems.items() if is_there]

    @model_validator(mode="after")
    def _consistent(self) -> Adapter:
        shape = {"rank", "alpha", "dropout", "target_modules", "rslora", "dora", "rank_pattern", "alpha_pattern", "layers", "rank_budget", "rank_cap"}
        if self.start is not None and (given := sorted(n for n in shape & self.model_fields_set if getattr(self, n) != Adapter.model_fields[n].default)):
            raise ValueError(f"{', '.join(given)}: an adapter that goes on from start has the shape of that one; remove them")
        if self.start is None and self.unknown_base == "accept":
            raise ValueError("unknown_base goes with start; remove it")
        if self.start is None and self.steps == 0:
            raise ValueError("steps is 0, so nothing would be learnt; give start to use an adapter as it is")
        if self.init != "zero" and (self.dora or self.start is not None):
            raise ValueError(f"init {self.init} is a start of its own: it goes neither with dora, whose magnitudes depend on it, nor with start")
        self._check_budget()
        if self.steps and self.warmup_steps >= self.steps and self.schedule != "constant":
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})")
        if self.patience is not None and self.evaluation_steps is None:
            raise ValueError("patience counts evaluations, and there are none: give evaluation_steps")
        return self

    def _check_budget(self) -> None:
        if self.rank_budget is None:
            if self.rank_cap is not None:
                raise ValueError("rank_cap goes with rank_budget; remove it")
            return
        if self.init == "zero":
            raise ValueError("rank_budget follows what init corrects, and init zero corrects nothing; set init to svd or qera")
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError("rank_budget finds the rank_pattern, and the alpha_pattern that keeps the scaling; remove those that are given")
        if self.rank_budget * self.rank < 1:
            raise ValueError(f"rank_budget {self.rank_budget:g} of rank {self.rank} does not give each layer a rank of 1; raise it to {1 / self.rank:g}")
        if self.rank_cap is not None and self.rank_cap < self.rank_budget * self.rank:
            raise ValueError(f"rank_cap {self.rank_cap} leaves some of rank_budget unused even if every layer has it; raise it, or give one rank")
        if self.rank_budget * self.rank > 4 * self.rank and self.rank_cap is None:
            raise ValueError(f"rank_budget {self.rank_budget:g} is more than four times rank in every layer; raise rank, or give rank_cap")


class SimulationRule(Section):
    """Some values of the simulated graph: kept float, or on a grid of their own."""

    match: str = Field(description="a glob over module paths, and those with an operator: lm_head, *.self_attn.softmax, *.lora_A.weight")
    keep: Literal["float"] | None = Field(None, description="float leaves the values as they are")
    bitwidth: Literal[2, 3, 4, 5, 6, 7, 8, 16] | None = Field(None, description="the simulation's unless given")
    symmetric: bool | None = Field(None, description="likewise")
    minimum: float | None = Field(None, description="the low end of the range, whatever is observed")
    maximum: float | None = Field(None, description="the high end; a softmax may be pinned to 0 and 1")
    observer: Literal["min-max", "percentile", "squared-error", "sqnr", "moving-average"] | None = Field(None, description="the simulation's unless given")
    force: bool = Field(False, description="quantize what matches even where the policy would not")
    of: Literal["activations", "weights"] | None = Field(None, description="what it speaks of; unless given, keep speaks of both and a grid of activations")

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
        "npu", description="npu: every value that is made, but for norms' inside, masks and residual additions; matmul-inputs: what matrix products read"
    )
    rules: list[SimulationRule] = Field([], description="what is different for some values; the first that fits a value decides")
    activation_bitwidth: Literal[2, 3, 4, 5, 6, 7, 8, 16] = Field(16, description="bits of every activation; ONNX has 8 and 16")
    activation_symmetric: bool = Field(False, description="fix the offset of activations at the middle code")
    observer: Literal["min-max", "percentile", "squared-error", "sqnr", "moving-average"] = Field(
        "min-max", description="how an activation's range is chosen; sqnr: squared error with clipping weighing three times"
    )
    percentile: Annotated[float, Field(gt=50, le=100)] = Field(99.99, description="of observer percentile: the rest lies outside, on either side")
    momentum: Annotated[float, Field(gt=0, le=1)] = Field(0.01, description="of observer moving-average: what the last batch weighs")
    calibration_tokens: Count | None = Field(None, description="stop after this many; all of data.calibration_sequences unless given")
    still_share: Annotated[float, Field(ge=0)] | None = Field(
        None, description="stop when no range has moved by more than this share for still_batches batches; never unless given"
    )
    still_batches: Count = Field(4, description="see still_share")
    unseen: Literal["error", "float"] = Field("error", description="what to do with a value that no data came by for, like an expert that no token chose")
    residual_adds: Literal["float", "quantize"] = Field("float", description="whether x + f(x) gets an encoding; an NPU without float needs quantize")
    symmetric_matmul_second_input: bool = Field(False, description="the second factor of two activations gets a symmetric grid, as some runtimes need it")
    adapter_weights: AdapterWeights = Field(AdapterWeights(), description="the grid of lora_A and lora_B")
    equalize: Literal["auto", "none", "diagonal", "hadamard"] = Field(
        "auto", description="other factors of the same product, for the adapter's grid; auto: of each layer those with the least error, its own among them"
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


class Export(Section):
    """Which files to write."""

    targets: list[Literal["onnx"]] = Field(["onnx"], description="formats to write")


class Verify(Section):
    """How the files are proved, and what the proof must keep to."""

    sequences: Count = Field(8, description="held-out sequences to run through each exported file, at most")
    layer_tokens: Annotated[int, Field(ge=2)] = Field(128, description="tokens for the layer by layer comparison")
    perplexity_difference: Annotated[float, Field(gt=0)] = Field(0.003, description="largest allowed relative difference from the simulation's perplexity")
    layer_steps: Annotated[float, Field(gt=0)] = Field(2.0, description="largest allowed difference of a layer's output, in its quantization steps")
    layer_mean_steps: Annotated[float, Field(gt=0)] = Field(0.05, description="the same for a layer's average difference")


class Recipe(Section):
    """The whole file."""

    name: Name = Field("qwlora", description="what this job is called; an output directory belongs to one job")
    workflow: Literal["qw-lora", "qwa-lora"] = Field(
        "qw-lora",
        description="qw-lora: activations are calibrated after training; qwa-lora: the base's are calibrated first, and the adapters are trained through them",
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of the data split, the adapters' start and the order of training")
    model: Model
    data: Data
    base: Base = Base()
    adapters: list[Adapter] = Field(min_length=1, description="one base, many adapters")
    simulation: SimulationSection = SimulationSection()
    export: Export = Export()
    verify: Verify = Verify()

    @model_validator(mode="after")
    def _encodings_are_used(self) -> Recipe:
        if self.model.encodings is not None and self.base.solver != "keep":
            raise ValueError("model.encodings are taken by base.solver keep; set it, or remove them")
        needy = [a.name for a in self.adapters if a.init != "zero" or a.objective == "recovery"]
        if self.base.solver == "keep" and self.model.encodings is None and needy:
            raise ValueError(f"adapters {', '.join(needy)}: recovery, and a start other than zero, need floats, which base.solver keep does not have")
        return self

    @model_validator(mode="after")
    def _runtimes_have_the_bits(self) -> Recipe:
        section = self.simulation
        asked = {"simulation.activation_bitwidth": section.activation_bitwidth if section.policy != "weights-only" else 8}
        asked |= {f"simulation.rules.{i}.bitwidth": r.bitwidth for i, r in enumerate(section.rules) if r.bitwidth is not None and r.of != "weights"}
        if "onnx" in self.export.targets and (wrong := [f"{where} {bits}" for where, bits in asked.items() if bits not in (8, 16)]):
            raise ValueError(f"{', '.join(wrong)}: ONNX has activations of 8 and 16 bits; change that, or take onnx out of export.targets")
        return self

    @model_validator(mode="after")
    def _starts_come_first(self) -> Recipe:
        names = [a.name for a in self.adapters]
        for i, adapter in enumerate(self.adapters):
            if adapter.start in names[i:]:
                raise ValueError(f"adapter {adapter.name} starts from {adapter.start}, which must be listed before it")
        return self

    @model_validator(mode="after")
    def _what_is_shared_has_one_shape(self) -> Recipe:
        ranks = {(a.rank, tuple(sorted(a.rank_pattern.items()))) for a in self.adapters if a.start is None}
        if self.simulation.base_activations == "none" and len(ranks) > 1:
            raise ValueError("simulation.base_activations none: adapters that share every encoding have one rank; give them one, or say adapter_only")
        return self

    @model_validator(mode="after")
    def _fits_the_workflow(self) -> Recipe:
        if self.workflow == "qw-lora":
            problems = [f"adapter {a.name}: range_learning_rate goes with workflow qwa-lora" for a in self.adapters if a.range_learning_rate is not None]
        else:
            problems = [problem for adapter in self.adapters if adapter.steps for problem in adapter.without_graph()]
            if self.data.packing == "documents":
                problems.append("data.packing documents needs positions, which the graph does not take; use join or none")
            if self.simulation.base_activations != "all":
                problems.append("simulation.base_activations: the base's activations are calibrated before training, for all adapters; leave it out")
        if problems:
            raise ValueError(f"workflow {self.workflow}: {'; '.join(problems)}")
        return self

    def start_of(self, adapter: Adapter) -> Adapter | None:
        """The recipe's own adapter that `adapter` goes on from."""
        return next((a for a in self.adapters if a.name == adapter.start), None)

    @field_validator("adapters")
    @classmethod
    def _distinct(cls, adapters: list[Adapter]) -> list[Adapter]:
        names = [a.name for a in adapters]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"two adapters are named {', '.join(twice)}; names are folders and must differ")
        return adapters


def load_recipe(path: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read, change and validate a recipe.

    Args:
        changes: `section.key=value`, the value in YAML; `adapters.0.steps=5` reaches into a list.

    Raises:
        RecipeError: with every problem found.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(source, [f"cannot be read: {getattr(error, 'strerror', None) or error}"]) from error
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(source, [f"is not YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise RecipeError(source, ["is not a mapping of sections; `qwlora init` writes one to start from"])
    problems = [p for change in changes if (p := _change(content, change))]
    problems += _missing_sources(content)
    _make_paths_absolute(content)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(source, [*problems, *_describe(error)]) from error
    if problems:
        raise RecipeError(source, problems)
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 5e-4 for a string; everybody else for a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789"))


def _change(content: dict[str, Any], change: str) -> str | None:
    """Apply one `a.b.c=value`; returns what is wrong with it, if anything."""
    path, equals, value = change.partition("=")
    if not equals or not path:
        return f"--set {change}: write it like base.weights.bitwidth=3"
    *parents, last = path.split(".")
    node: Any = content
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = yaml.load(value, Loader=_Loader)
        elif isinstance(node, dict):
            node[last] = yaml.load(value, Loader=_Loader)
        else:
            return f"--set {change}: {'.'.join(parents)} is a value, not a section"
    except (ValueError, IndexError, AttributeError):
        return f"--set {change}: nothing is at {path}"
    except yaml.YAMLError:
        return f"--set {change}: {value} is not YAML"
    return None


def _describe(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            valid = _keys_at(item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.5)
            yield f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else f"; known are {', '.join(valid)}")
        elif item["type"] == "missing":
            yield f"{where}: required and not given"
        else:
            yield f"{where or 'recipe'}: {item['msg'].removeprefix('Value error, ')}" + _given(item)


def _given(item: Any) -> str:
    value = item.get("input")
    return "" if isinstance(value, dict | list | BaseModel) or item["type"] == "value_error" else f" (given: {value!r})"


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at `location`."""
    kind: Any = Recipe
    for key in location:
        if isinstance(key, str):
            kind = kind.model_fields[key].annotation
        found = re.findall(r"recipe\.(\w+)", str(kind)) or [getattr(kind, "__name__", "")]
        kind = globals().get(found[0], Recipe)
    return list(kind.model_fields)


def _make_paths_absolute(content: dict[str, Any]) -> None:
    """Sources that are paths are relative to the current directory; the resolved recipe must not be."""
    for part in (content.get("model"), content.get("data")):
        if isinstance(part, dict) and isinstance(source := part.get("source"), str) and Path(source).expanduser().exists():
            part["source"] = str(Path(source).expanduser().absolute())
    model = content.get("model")
    if isinstance(model, dict) and isinstance(encodings := model.get("encodings"), str):
        model["encodings"] = str(Path(encodings).expanduser().absolute())
    data = content.get("data")
    if isinstance(data, dict) and isinstance(template := data.get("chat_template"), str):
        data["chat_template"] = str(Path(template).expanduser().absolute())
    names = {adapter.get("name") for adapter in _adapters(content)}
    for adapter in _adapters(content):
        if isinstance(start := adapter.get("start"), str) and start not in names and Path(start).expanduser().exists():
            adapter["start"] = str(Path(start).expanduser().absolute())


def _adapters(content: dict[str, Any]) -> list[dict[str, Any]]:
    adapters = content.get("adapters")
    return [a for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []


def _missing_sources(content: dict[str, Any]) -> list[str]:
    """Model and data that are not where the recipe says, as far as can be seen without loading them."""
    from qwlora.base.source import locate
    from qwlora.data import locate_documents

    problems = []
    for section, look in (("model", locate), ("data", locate_documents)):
        part = content.get(section)
        source = part.get("source") if isinstance(part, dict) else None
        if isinstance(source, str):
            try:
                look(source)
            except SourceError as error:
                problems.append(f"{section}.source: {error}")
        template = part.get("chat_template") if isinstance(part, dict) else None
        if isinstance(template, str) and not Path(template).expanduser().is_file():
            problems.append(f"{section}.chat_template: {template!r} is not a file")
    names = {adapter.get("name") for adapter in _adapters(content)}
    for i, adapter in enumerate(_adapters(content)):
        start = adapter.get("start")
        if isinstance(start, str) and start not in names and not Path(start).expanduser().exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", start):
            problems.append(f"adapters.{i}.start: adapter {start!r} does not exist. Give another's name, a folder with adapter_config.json, or a hub id")
    return problems
