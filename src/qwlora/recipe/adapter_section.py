"""Step 2: the adapters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from qwlora.parameter_names import pattern_problem
from qwlora.recipe.section import Count, Name, Section

Rank = Annotated[int, Field(ge=1, lt=2**31)]  # whether a layer is as large is seen before training
Rate = Annotated[float, Field(gt=0, le=1)]  # AdamW moves each weight by about this much a step


class Adapter(Section):
    """Step 2, for one adapter."""

    name: Name = Field(description="also the name of its folder")
    start: str | None = Field(
        None,
        description="an adapter to go on from, whose shape and dropout it takes: one that the recipe lists before this, or a PEFT adapter's folder or hub id; "
        "workflow qwa-lora leaves its dropout out",
    )
    objective: Literal["text", "recovery"] = Field(
        "text", description="recovery: come near the float model besides, to be the start of others"
    )
    unknown_base: Literal["refuse", "accept"] = Field(
        "refuse",
        description="a start that does not say which base it was trained on, as PEFT saves them",
    )
    rank: Rank = Field(16, description="inner dimension of lora_B lora_A")
    alpha: Annotated[float, Field(gt=0)] = Field(
        32.0, description="the branch is scaled by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="dropout before lora_A while training"
    )
    target_modules: str | list[str] = Field(
        "all-linear",
        description="which layers get an adapter: names, or a regular expression for whole paths",
    )
    target_parameters: list[str] = Field(
        [],
        description="fused experts that get one besides, by the ends of their names: mlp.experts.down_proj",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead")
    init: Literal["zero", "svd", "qera"] = Field(
        "zero",
        description="start at zero, or at the best correction of what was lost: of weights (svd), of what their errors do to their block's output (qera)",
    )
    init_share: Annotated[float, Field(gt=0, le=1)] = Field(
        0.5,
        description="share of a layer's ranks that init corrects with, rounded up; the others start as at zero, free to learn (at 2 bits, 1 ends lower). "
        "With rank_budget, all correct",
    )
    rank_budget: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="ranks by layer: share of the parameters that rank has in the quantized layers, given to those that init corrects most",
    )
    rank_cap: Rank | None = Field(
        None,
        description="the largest rank that rank_budget gives a layer, four times rank unless given",
    )
    dora: bool = Field(False, description="DoRA: learn the norm of each output of a layer besides")
    rank_pattern: dict[str, Rank] = Field(
        {}, description="other ranks, by the end of a module's name or a regular expression"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other alphas, likewise"
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None, description="numbers of the transformer layers that get an adapter; all unless given"
    )
    steps: Annotated[int, Field(ge=0)] = Field(
        60, description="optimizer steps, at most; 0 with start uses that adapter as it is"
    )
    batch_sequences: Count = Field(1, description="sequences in a forward pass, over all processes")
    accumulation_steps: Count = Field(1, description="forward passes in a step")
    learning_rate: Rate = Field(5e-4, description="peak learning rate of AdamW")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="of AdamW")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="how the learning rate moves"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        5, description="steps from zero to the peak learning rate"
    )
    clip: Annotated[float, Field(ge=0)] = Field(
        1.0, description="largest norm of a step's gradient; 0 does not clip"
    )
    compute: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="precision of the forward and backward pass; weights and optimizer stay float32",
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute each layer again in the backward pass instead of keeping what is inside it",
    )
    loss: Literal["chunked", "whole"] | None = Field(
        None,
        description="whole: the model's own loss, which makes the logits of the whole batch; chunked unless given, but with workflow qwa-lora",
    )
    evaluation_steps: Count | None = Field(
        None,
        description="steps between evaluations on held-out text; the best adapter is kept. None unless given",
    )
    patience: Count | None = Field(
        None,
        description="evaluations without a better one after which training stops; needs evaluation_steps",
    )
    divergence: Literal["stop", "ignore"] = Field(
        "stop",
        description="whether a loss that stays far above what it was ends training with an error; one that is no number always does",
    )
    range_learning_rate: Rate | None = Field(
        None,
        description="learn the ranges of the base's activations too, at this rate, relative to their size (workflow qwa-lora). Fixed unless given",
    )
    report_to: list[str] = Field(
        [], description="loggers, by their names in transformers: tensorboard, wandb, mlflow ..."
    )
    checkpoint_steps: Count = Field(
        10, description="steps between checkpoints; an interrupted run goes on from the last"
    )

    def shape(self) -> dict[str, Any]:
        """What says how large its weights are, by key; which layers have some depends on the model."""
        return {"rank": self.rank, "rank_pattern": self.rank_pattern, "dora": self.dora}

    @property
    def correcting_share(self) -> float:
        """Of a layer's ranks, those that init corrects with."""
        return self.init_share if self.rank_budget is None else 1.0

    def without_graph(self) -> list[str]:
        """What of this cannot be trained through a captured graph, each with the way out."""
        problems = {
            "objective recovery watches layers, which do not run": self.objective == "recovery",
            "dropout is not in a graph of evaluation; set it to 0": self.dropout > 0,
            "gradient_checkpointing needs layers that run; leave it out": self.gradient_checkpointing,
            "compute bfloat16 cannot hold the steps of the grids; use float32": self.compute
            == "bfloat16",
            "loss chunked needs an output head outside the graph; use whole": self.loss
            == "chunked",
        }
        return [
            f"adapter {self.name}: {problem}" for problem, is_there in problems.items() if is_there
        ]

    @field_validator("target_modules")
    @classmethod
    def _is_regular(cls, target: str | list[str]) -> str | list[str]:
        if isinstance(target, str) and (problem := pattern_problem(target)):
            raise ValueError(problem)
        return target

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_regular(cls, patterns: dict[str, float]) -> dict[str, float]:
        if problems := [
            problem for pattern in patterns if (problem := pattern_problem(pattern, is_end=True))
        ]:
            raise ValueError("; ".join(problems))
        return patterns

    @model_validator(mode="after")
    def _consistent(self) -> Adapter:
        shape = {
            "rank",
            "alpha",
            "dropout",
            "target_modules",
            "target_parameters",
            "rslora",
            "dora",
            "rank_pattern",
            "alpha_pattern",
            "layers",
        }
        shape |= {"rank_budget", "rank_cap"}
        if self.start is not None and (
            given := sorted(
                n
                for n in shape & self.model_fields_set
                if getattr(self, n) != Adapter.model_fields[n].default
            )
        ):
            raise ValueError(
                f"{', '.join(given)}: an adapter that goes on from start has the shape of that one; remove them"
            )
        if self.start is None and self.unknown_base == "accept":
            raise ValueError("unknown_base goes with start; remove it")
        if self.start is None and self.steps == 0:
            raise ValueError(
                "steps is 0, so nothing would be learnt; give start to use an adapter as it is"
            )
        if self.target_parameters and (
            given := [
                n for n in ("dropout", "dora", "layers") if getattr(self, n) not in (None, 0, False)
            ]
        ):
            raise ValueError(
                f"{', '.join(given)}: PEFT's adapters on target_parameters do not have that; remove it, or target_parameters"
            )
        if self.init != "zero" and (self.dora or self.start is not None):
            raise ValueError(
                f"init {self.init} is a start of its own: it goes neither with dora, whose magnitudes depend on it, nor with start"
            )
        if self.init == "zero" and self.init_share != Adapter.model_fields["init_share"].default:
            raise ValueError(
                "init_share is of the ranks that init corrects with, and init zero corrects nothing; remove it, or set init to svd or qera"
            )
        self._check_budget()
        if self.steps and self.warmup_steps >= self.steps and self.schedule != "constant":
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({self.steps})"
            )
        if self.patience is not None and self.evaluation_steps is None:
            raise ValueError(
                "patience counts evaluations, and there are none: give evaluation_steps"
            )
        return self

    def _check_budget(self) -> None:
        if self.rank_budget is None:
            if self.rank_cap is not None:
                raise ValueError("rank_cap goes with rank_budget; remove it")
            return
        if self.init == "zero":
            raise ValueError(
                "rank_budget follows what init corrects, and init zero corrects nothing; set init to svd or qera"
            )
        if self.init_share != Adapter.model_fields["init_share"].default:
            raise ValueError(
                "rank_budget gives layers the ranks that correct most, and all of them do; remove init_share"
            )
        if self.rank_pattern or self.alpha_pattern:
            raise ValueError(
                "rank_budget finds the rank_pattern, and the alpha_pattern that keeps the scaling; remove those that are given"
            )
        if self.rank_budget * self.rank < 1:
            raise ValueError(
                f"rank_budget {self.rank_budget:g} of rank {self.rank} does not give each layer a rank of 1; raise it to {1 / self.rank:g}"
            )
        if self.rank_cap is not None and self.rank_cap < self.rank_budget * self.rank:
            raise ValueError(
                f"rank_cap {self.rank_cap} leaves some of rank_budget unused even if every layer has it; raise it, or give one rank"
            )
        if self.rank_budget * self.rank > 4 * self.rank and self.rank_cap is None:
            raise ValueError(
                f"rank_budget {self.rank_budget:g} is more than four times rank in every layer; raise rank, or give rank_cap"
            )
