"""Recipe sections `model`, `base` and `simulation`: the grids of steps 1 and 3."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from qwlora.data.read_source import locate_documents
from qwlora.formats.model_source import locate
from qwlora.grid.scheme import EstimatorName, RangeEstimator, Scheme, parse_scheme, short_name
from qwlora.quantize.solvers import SOLVERS, SolverName
from qwlora.recipe.section import Count, Name, NotNegative, Section, file, located
from qwlora.simulation.placement_rules import PlacementRule, Schemes
from qwlora.targets.refusals import Weight

if TYPE_CHECKING:
    from qwlora.quantize.layer_rules import LayerRule

    BaseSolver = str
else:
    BaseSolver = Literal[(*SOLVERS, "keep")]

JOB, MODEL = "job", "model"  # parts of base.calibration that are not sources of text
_ADAPTER_WEIGHTS = r"^w([4-9]|1[0-6])-(channel|tensor)(-asymmetric)?$"
Bitwidth = Annotated[int, Field(ge=2, le=16)]
ShortName = Annotated[  # of a scheme; w04-block032 becomes w4-block32
    str, AfterValidator(lambda name: short_name(parse_scheme(name))), Field(pattern="^w[2-8]-")
]


class Model(Section):
    """The model to freeze."""

    source: Annotated[str, AfterValidator(partial(located, check=locate))]
    """a checkpoint folder, a .gguf file, package:NAME/PATH for a file in an installed package, or a
    hub id (owner/name, owner/name/FILE.gguf)"""
    trust_remote_code: bool = False
    """run Python code from the model's folder, if its files name some (auto_map); it can do
    whatever you can"""
    encodings: Annotated[str, file("the .encodings or .json file that AIMET wrote")] | None = None
    """an AIMET encodings file for the float weights in source; needs base.solver: keep"""
    keep_float: list[str] = []
    """with encodings: globs of parameters or layers that stay float, even if the file has
    entries for them"""
    block_order: Literal["channel", "tensor"] | None = None
    """with encodings of version 1.0.0 from unknown producers: order of the blocks, by output
    channel or as in the tensor"""
    prefix: str | None = None
    """with encodings: prefix that names have in the file and not in the model, or the reverse.
    Default: the one that makes most names agree"""


class BaseRule(Section):
    """An exception for some layers. Keys that are not set are those of base."""

    match: str
    """glob over module paths: *.down_proj, model.layers.0.*, lm_head"""
    keep: Literal["float"] | None = None
    """leave these layers as they are"""
    solver: SolverName | None = None
    weights: ShortName | None = None

    def problems(self) -> Iterator[str]:
        changes = [key for key in ("solver", "weights") if getattr(self, key) is not None]
        if self.keep is not None and changes:
            yield f"keep: float excludes {', '.join(changes)}; remove one or the other"
        if self.keep is None and not changes:
            yield "the rule changes nothing; set keep: float, weights or solver"

    def scheme(self, base: Base) -> Scheme | None:
        return None if self.keep is not None else parse_scheme(self.weights or base.weights)


class Gptq(Section):
    """Settings of the gptq solver."""

    damping: Annotated[float, Field(gt=0)] = 0.01
    """added to the diagonal of the second moment, as a share of its mean"""
    activation_order: bool = False
    """quantize the columns with the largest inputs first; scales are then chosen beforehand"""
    sweeps: NotNegative = 2
    """passes of coordinate descent over codes and scales after GPTQ. 4 gains about 2 percent of
    layer error for half as much time again"""


class Tuning(Section):
    """The float model stays in memory during tuning."""

    steps: NotNegative = 0
    """tuning steps of one sequence each, none repeated until all are used. 512 take 25 minutes for
    SmolLM2-135M on one core with bfloat16, 46 without"""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 3e-3
    """peak learning rate of AdamW, relative to the tuned value"""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """precision of the forward and backward pass; auto: bfloat16 if the processor has it"""


class CalibrationText(Section):
    """A part of the text that the base is calibrated on: its name, or these keys."""

    text: Annotated[
        str, AfterValidator(lambda t: t if t in (JOB, MODEL) else located(t, locate_documents))
    ]
    """job: the job's training text, see calibrate_on; model: what the float model writes after a
    random first token; anything else: a source, as in data.source"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """number of sequences, relative to the other parts"""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """of text: model. List it several times for several temperatures"""

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"text": value} if isinstance(value, str) else value


class Base(Section):
    """Step 1: the frozen integers."""

    solver: BaseSolver = "gptq"
    """gptq: minimizes the error of layer outputs on calibration text; search: range with the least
    squared weight error; sqnr: the same, clipping weighs three times; rtn: min-max range, rounded
    to nearest; keep: the integers that the model files already hold"""
    weights: ShortName = "w4-signed32"
    """grid of every Linear weight: w, its bits (2 to 8), and what one scale covers, as in
    w8-channel. tensor, channel: the tensor, an output channel; block32: 32 inputs of one output;
    signed32: the same, with scales of either sign, for smaller errors at 2 to 4 bits; bf16block32:
    with bfloat16 scales, for executorch; lpbq64: AIMET's low-power blocks, small integers times a
    channel scale. tensor, channel and block can be asymmetric, with an offset for every scale:
    w2-block32-asymmetric. Default: w4-block32 for Qualcomm's targets, which have no signed
    scales"""
    rules: list[BaseRule] = []
    """exceptions for some layers; the first that matches decides"""
    rotation: Literal["hadamard"] | None = None
    """hadamard: first spread large values of a few channels over all of them, for grids per channel
    and 8-bit activations. Changes no output. Not for models with LayerNorm; unties a tied head"""
    bits: Annotated[float, Field(gt=0)] | None = None
    """bits per weight of all packed layers together, scales and offsets included. Layers without a
    rule get the bitwidths (2 to 8) and block sizes (32, 64, 128) with the least predicted loss that
    all export targets hold; base/rules.yaml has them as rules to reuse"""
    size: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?(kB|MB|GB)$")] | None = None
    """in place of bits: the size of all packed layers, such as 60MB or 1.5GB"""
    gptq: Gptq = Gptq()
    tuning: Tuning = Tuning()
    """after every layer is solved, train scales of linear layers and weights of norms together to
    match the float model's logits; codes do not change"""
    calibration_sequences: Count = 32
    """training sequences for gptq, at most; for activation ranges: data.calibration_sequences"""
    calibration: list[CalibrationText] = Field([JOB], min_length=1, validate_default=True)
    """what these sequences, and those of tuning, are taken from, in turn: [job, model,
    path/to/text]. Mix for a base that more adapters will be trained on. Adapters for recovery learn
    from the job's text, or from these if job is none of them"""
    calibrate_on: list[Name] = []
    """adapters whose text the base is calibrated on. Default: data.source, or else the text of
    every adapter"""

    def layer_rules(self) -> list[LayerRule]:
        from qwlora.quantize.layer_rules import LayerRule

        return [LayerRule(rule.match, rule.scheme(self), rule.solver) for rule in self.rules]

    @property
    def scheme(self) -> Scheme:
        return parse_scheme(self.weights)

    def grids(self) -> dict[str, Weight]:
        """The grids that are asked for, by the first key or rule; none with solver keep."""
        if self.solver == "keep":
            return {}
        grids = {Weight(self.scheme, self.solver): "base.weights"}
        for rule in self.rules:
            if (scheme := rule.scheme(self)) is not None:
                grids.setdefault(Weight(scheme, rule.solver or self.solver), rule.match)
        return {name: weight for weight, name in grids.items()}

    @property
    def bytes(self) -> float | None:
        if self.size is None:
            return None
        units = {"kB": 1e3, "MB": 1e6, "GB": 1e9}
        return float(self.size[:-2]) * units[self.size[-2:]]

    @property
    def has_budget(self) -> bool:
        return self.bits is not None or self.size is not None

    def problems(self) -> Iterator[str]:
        if self.bits is not None and self.size is not None:
            yield "bits and size are two ways to say the same; remove one"
        changed = {"weights", "rules", "bits", "size", "gptq"}
        changes = list(self.model_dump(include=changed, exclude_defaults=True))
        changes += ["tuning"] if self.tuning.steps else []
        if self.solver == "keep" and changes:
            yield f"solver keep uses the integers unchanged; remove {' and '.join(changes)}"


class SimulationRule(Section):
    """An exception for some values of the graph. Keys that are not set are those of simulation."""

    match: str
    """glob over module paths, followed by an operator where needed: lm_head, *.self_attn.softmax,
    *.lora_A.weight"""
    keep: Literal["float"] | None = None
    """leave these values as they are"""
    bitwidth: Bitwidth | None = None
    symmetric: bool | None = None
    minimum: float | None = None
    """fixed lower end of the range"""
    maximum: float | None = None
    """fixed upper end; a softmax may be fixed to 0 and 1"""
    observer: EstimatorName | None = None
    force: bool = False
    """quantize matching values even where the policy would not"""
    of: Literal["activations", "weights"] | None = None
    """restrict the rule to activations or weights. Default: both if it has keep, else
    activations"""

    def problems(self) -> Iterator[str]:
        try:
            self.placement_rule(RangeEstimator())
        except ValueError as error:
            yield str(error)

    def placement_rule(self, usual: RangeEstimator) -> PlacementRule:
        """The rule as `simulate` takes it; settings of an observer come from `usual`."""
        estimator = replace(usual, name=self.observer) if self.observer is not None else None
        return PlacementRule(**{**self.model_dump(), "observer": estimator})


class SimulationSection(Section):
    """Step 3: grids of activations and adapters. Targets aimet, qairt and qnn have other defaults,
    those that they need; `qwlora check` prints them."""

    policy: Literal["npu", "matmul-inputs", "weights-only"] = "npu"
    """npu: every computed value except norm internals, masks and residual additions; matmul-inputs:
    only what matrix products read; weights-only: no activations, which an NPU computes in
    float16"""
    rules: list[SimulationRule] = []
    """exceptions for some values; the first that matches decides"""
    inputs: Literal["tokens", "embeddings"] = "tokens"
    """what the graph takes. embeddings: for the language model of a vision-language model; the
    table of token embeddings is next to the files"""
    activation_bitwidth: Bitwidth = 16
    """bits of every activation. ONNX has 8 and 16"""
    activation_symmetric: bool = False
    """fix the offset of activations at the middle code"""
    observer: EstimatorName = "min-max"
    """how an activation range is chosen; sqnr: least squared error, clipping weighs three times"""
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    """for observer percentile: share of the values inside the range"""
    calibration_tokens: Count | None = None
    """stop calibration after this many tokens"""
    unseen: Literal["error", "float"] = "error"
    """what to do with values that no calibration data reached, such as those of an unused expert"""
    residual_adds: Literal["float", "quantize"] = "float"
    """quantize: also give x + f(x) a grid, for NPUs without float; costs accuracy, as its range is
    wide"""
    symmetric_matmul_second_input: bool = False
    """symmetric grid for the second operand of a product of two activations; Qualcomm HTP needs it
    at 16 bits"""
    key_value_bitwidth: Literal[8, 16] | None = None
    """bits of the keys and values of attention, on a symmetric grid, as in an NPU's key-value
    cache. Default: as other activations"""
    adapter_weights: Annotated[str, Field(pattern=_ADAPTER_WEIGHTS)] = "w8-channel"
    """grid of lora_A and lora_B: w4 to w16, with one scale per tensor or per channel (row), such as
    w8-tensor or w16-channel-asymmetric"""
    adapter_activation_bitwidth: Bitwidth | None = None
    """bits of what lora_A and lora_B compute, before the base layer's output is added. Default: as
    other activations"""
    base_activations: Literal["all", "adapter_only", "none"] = "all"
    """encodings that change with the adapter, as QAIRT's quant_updatable_mode. all: every
    activation; adapter_only: lora_A, lora_B and their outputs before the base layer's is added;
    none: one set for all adapters, padded to one rank on the same layers"""

    def schemes(self) -> Schemes:
        observer = RangeEstimator(self.observer, self.percentile)
        return Schemes(
            activations=Scheme(self.activation_bitwidth, self.activation_symmetric),
            adapter_weights=parse_scheme(self.adapter_weights),
            quantize_residual_adds=self.residual_adds == "quantize",
            policy=self.policy,
            rules=tuple(rule.placement_rule(observer) for rule in self.rules),
            observer=observer,
            symmetric_matmul_second_input=self.symmetric_matmul_second_input,
            key_value_bitwidth=self.key_value_bitwidth,
            adapter_activation_bitwidth=self.adapter_activation_bitwidth,
            # A rule may have its effect in another graph of the job.
            unused_rules="allow",
        )
