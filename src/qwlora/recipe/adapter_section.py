"""Recipe section `adapters`: step 2."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qwlora.recipe.data_section import Data
from qwlora.recipe.section import Count, Name, Section
from qwlora.system.parameter_names import pattern_problem

if TYPE_CHECKING:
    from qwlora.adapter.attach import LoraShape
    from qwlora.adapter.train import TrainingSettings

Rank = Annotated[int, Field(ge=1, lt=2**31)]  # layer sizes are checked before training
_SHAPE = {  # keys of `LoraShape`, whose module imports torch
    *("rank", "alpha", "dropout", "target_modules", "target_parameters"),
    *("rslora", "dora", "rank_pattern", "alpha_pattern", "layers"),
}
Rate = Annotated[float, Field(gt=0, le=1)]  # AdamW changes a weight by about this much per step


class Adapter(Section):
    """Step 2: one adapter: its shape, initialization and training."""

    name: Name = Field(description="name of the adapter and of its folder")
    data: Data | None = Field(
        None,
        description="its own text: any keys of the data section, which gives the defaults of the "
        "others",
    )
    continue_from: str | None = Field(
        None,
        description="trained adapter to continue training: the name of one listed before this one, "
        "a PEFT folder, package:NAME/PATH or a hub id. Its shape and dropout are kept (no dropout "
        "in workflow qwa-lora). Default: a new adapter",
    )
    objective: Literal["text", "recovery"] = Field(
        "text",
        description="text: the next token; recovery: match the float model as well, to be "
        "continued by other adapters",
    )
    unknown_base: Literal["refuse", "accept"] = Field(
        "refuse",
        description="accept: continue_from may be an adapter that does not record which base it "
        "was trained on, such as one that PEFT saved",
    )
    rank: Rank = Field(16, description="inner dimension of lora_B @ lora_A")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32.0, description="the adapter is scaled by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout before lora_A during training"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="layers that get an adapter: module names, or a regular expression over whole "
        "paths",
    )
    target_parameters: list[str] = Field(
        [],
        description="fused experts that get an adapter too, by the end of their names: "
        "mlp.experts.down_proj",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    init: Literal["zero", "svd", "qera"] = Field(
        "zero",
        description="zero: lora_B is zero; svd: correct the error of the weights; qera: correct "
        "the error of layer outputs (best; needs the float weights and second moments). "
        "Set by the preset",
    )
    init_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="share of the ranks that carry the correction, rounded up; the rest are zero "
        "and free to learn. Use 1 at 2 bits",
    )
    dora: bool = Field(False, description="DoRA: train the norm of every output as well")
    rank_pattern: dict[str, Rank] = Field(
        {},
        description="other ranks for some layers: end of the module path, or a regular expression",
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other alphas for some layers, written like rank_pattern"
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="numbers of the transformer layers that get an adapter. Default: all"
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        60, description="optimizer steps, at most. 0 with continue_from uses that adapter as it is"
    )
    batch_sequences: Count = Field(1, description="sequences per forward pass, over all processes")
    accumulation_steps: Count = Field(1, description="forward passes per optimizer step")
    learning_rate: Rate = Field(5e-4, description="peak learning rate of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay of AdamW")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="course of the learning rate"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        5, description="steps from zero to the peak learning rate"
    )
    clip: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest norm of the gradient; 0 disables clipping"
    )
    compute: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="precision of the forward and backward pass; auto: bfloat16 if the device "
        "has instructions for it (never in workflow qwa-lora), else float32. Weights and "
        "optimizer stay float32",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations in the backward pass: about a quarter of the memory for "
        "15 percent more time",
    )
    loss: Literal["chunked", "whole"] | None = Field(
        None,
        description="chunked: never holds the logits of a whole batch; whole: the model's own "
        "loss. Default: chunked, whole with workflow qwa-lora",
    )
    evaluation_steps: Count | None = Field(
        None,
        description="steps between evaluations on held-out text; the best adapter is kept. "
        "Default: no evaluation",
    )
    patience: Count | None = Field(
        None,
        description="stop after this many evaluations without improvement; needs evaluation_steps",
    )
    divergence: Literal["stop", "ignore"] = Field(
        "stop",
        description="stop: end with an error if the loss stays far above its first value; ignore: "
        "keep going. A loss that is not finite always stops",
    )
    report_to: list[str] = Field(
        [], description="loggers, by their transformers names: tensorboard, wandb, mlflow"
    )
    checkpoint_steps: Count = Field(
        10, description="steps between checkpoints; an interrupted run resumes from the last one"
    )

    def lora_shape(self) -> LoraShape:
        """Which layers get an adapter and its size, in the form that `attach` takes."""
        from qwlora.adapter.attach import LoraShape

        return LoraShape(**{key: value for key, value in self if key in _SHAPE})

    def training_settings(self, seed: int, whole_loss: bool) -> TrainingSettings:
        """The settings in the form that `train_adapter` takes.

        Args:
            whole_loss: the default of `loss` is the model's own loss, not the chunked one.
        """
        from qwlora.adapter.train import TrainingSettings

        keys = {f.name for f in fields(TrainingSettings)} - {"seed", "report_to", "loss"}
        return TrainingSettings(
            **{key: value for key, value in self if key in keys},
            seed=seed,
            report_to=tuple(self.report_to),
            loss=self.loss or ("whole" if whole_loss else "chunked"),
        )

    def without_graph(self) -> list[str]:
        """Settings that cannot be trained through a captured graph, and what to use instead."""
        problems = [
            (
                self.objective == "recovery",
                "objective recovery needs layer outputs, which the graph does not have; use text",
            ),
            (
                self.dropout > 0,
                "dropout is missing in the graph, which is captured in eval mode; set it to 0",
            ),
            (
                self.gradient_checkpointing,
                "gradient_checkpointing needs modules, which the graph replaces; remove it",
            ),
            (
                self.compute == "bfloat16",
                "compute bfloat16 is too coarse for the activation grids; use float32",
            ),
            (
                self.loss == "chunked",
                "loss chunked needs an output head outside of the graph; use whole",
            ),
        ]
        return [f"adapter {self.name}: {problem}" for is_set, problem in problems if is_set]

    @field_validator("target_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _are_regular(cls, value: Any) -> Any:
        problems = [pattern_problem(value)] if isinstance(value, str) else []
        if isinstance(value, dict):
            problems = [pattern_problem(pattern, is_end=True) for pattern in value]
        if any(problems):
            raise ValueError("; ".join(filter(None, problems)))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Adapter:
        continues = self.continue_from is not None
        shape = sorted(self.model_dump(include=_SHAPE, exclude_unset=True, exclude_defaults=True))
        if continues and shape:
            raise ValueError(
                f"{', '.join(shape)}: with continue_from, these come from that adapter; remove them"
            )
        if not continues and self.steps == 0:
            raise ValueError(
                "steps is 0, so nothing would be trained; set steps, or continue_from to use an "
                "adapter as it is"
            )
        unsupported = {
            "dropout": self.dropout > 0,
            "dora": self.dora,
            "layers": self.layers is not None,
        }
        named = [key for key, is_set in unsupported.items() if is_set]
        if self.target_parameters and named:
            raise ValueError(
                f"{', '.join(named)}: PEFT does not support this together with target_parameters; "
                "remove one of them"
            )
        if self.init != "zero" and (self.dora or continues):
            raise ValueError(
                f"init {self.init} cannot be combined with dora or continue_from; remove it, or "
                f"remove {'continue_from' if continues else 'dora'}"
            )
        if self.steps and self.warmup_steps >= self.steps and self.schedule != "constant":
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})"
            )
        if self.patience is not None and self.evaluation_steps is None:
            raise ValueError(
                "patience counts evaluations, but there are none; set evaluation_steps"
            )
        return self
