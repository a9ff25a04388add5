"""Recipe sections `data` and `adapters`: the text, and step 2."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from qwlora.data.prepared_data import Cutting
from qwlora.data.read_source import Reading, is_name_of_split, locate_documents
from qwlora.data.records import FIELDS, KINDS, OPTIONAL
from qwlora.data.rows import read_text
from qwlora.errors import SourceError
from qwlora.formats.model_source import is_hub_id, looked_for, source_path
from qwlora.recipe.section import Count, Name, NotNegative, Section, file, located
from qwlora.system.parameter_names import pattern_problem

if TYPE_CHECKING:
    from qwlora.adapter.attach import LoraShape
    from qwlora.adapter.train import TrainingSettings


def _evaluation(text: str) -> str:
    return text if is_name_of_split(text) else located(text, locate_documents)


class Data(Section):
    """Text for training, calibration and evaluation. Adapters inherit these keys."""

    source: Annotated[str, AfterValidator(partial(located, check=locate_documents))] | None = None
    """a .txt, .md, .json, .jsonl, .csv, .tsv, .parquet or .arrow file, a folder of them or of
    datasets.save_to_disk, python:MODULE:ATTRIBUTE, or a hub id"""
    split: str | None = None
    """split of a dataset (default: train), or the files of a folder named after it (default:
    all)"""
    subset: str | None = None
    """configuration of a hub dataset"""
    text_column: str | None = None
    """column with running text. Default: columns named text, prompt and completion, messages,
    conversations (ShareGPT), or instruction and output (Alpaca)"""
    prompt_column: str | None = None
    """prompt, not trained on"""
    completion_column: str | None = None
    """completion, trained on"""
    messages_column: str | None = None
    """conversations: lists of {role, content} or ShareGPT's {from, value}; only assistant messages
    are trained on"""
    instruction_column: str | None = None
    """Alpaca's instruction, not trained on"""
    input_column: str | None = None
    """Alpaca's input, not trained on; may be empty"""
    output_column: str | None = None
    """Alpaca's answer, trained on"""
    empty_records: Literal["error", "skip"] = "error"
    """what to do with empty or null records"""
    repeated: Literal["remove", "keep"] = "remove"
    """content in both parts. remove: drop held-out records that are trained on, and training
    paragraphs that are held out; keep: remove nothing"""
    chat_template: Annotated[str, file("a file with a Jinja template", read_text)] | None = None
    """file with a Jinja chat template. Default: the tokenizer's"""
    prompt_format: Literal["auto", "plain"] = "auto"
    """auto: prompts and completions become chat messages if there is a chat template; plain:
    running text"""
    turns: Literal["together", "apart"] = "together"
    """together: a conversation is one document; apart: every assistant message ends a document"""
    packing: Literal["join", "documents", "none"] | None = None
    """join: concatenate documents and cut anywhere (default for running text); documents: pack
    whole documents into one sequence, attention masked between them (default otherwise); none: one
    padded document per sequence"""
    sequence_tokens: Annotated[int, Field(ge=8)] = 512
    """tokens per sequence"""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """share of the text held out for evaluation, in whole documents"""
    evaluation: Annotated[str, AfterValidator(_evaluation)] | None = None
    """source of the held-out documents, or another split of source. Default: held_out of source"""
    most_lost: Annotated[float, Field(ge=0, le=1)] = 0.5
    """stop if more than this share of either part is removed, cut off or dropped"""
    evaluation_sequences: Count = 16
    """held-out sequences for perplexity"""
    calibration_sequences: Count = 8
    """training sequences for activation ranges"""

    def problems(self) -> Iterator[str]:
        named = self.reading().columns.keys()
        if not any(named <= {*fields, *OPTIONAL.get(kind, ())} for kind, fields in KINDS.items()):
            columns = " and ".join(f"{field}_column" for field in named)
            yield f"{columns} exclude each other; set only one kind"

    def read_template(self) -> str | None:
        return None if self.chat_template is None else read_text(Path(self.chat_template))

    def reading(self) -> Reading:
        names = {role: getattr(self, f"{role}_column") for role in FIELDS}
        columns = {role: name for role, name in names.items() if name is not None}
        skips, keeps = self.empty_records == "skip", self.repeated == "keep"
        return Reading(columns, self.split, self.subset, skips, keeps, self.evaluation)

    def cutting(self) -> Cutting:
        return Cutting(**{field.name: getattr(self, field.name) for field in fields(Cutting)})


Rank = Annotated[int, Field(ge=1, lt=2**31)]  # layer sizes are checked before training
# Not taken from the fields of `LoraShape`, whose module imports torch.
SHAPE = {
    *("rank", "alpha", "dropout", "target_modules", "target_parameters"),
    *("rslora", "dora", "rank_pattern", "alpha_pattern", "layers"),
}
_NOT_IN_GRAPH = {
    "objective recovery": "needs layer outputs, which the graph does not have; use text",
    "dropout": "is not part of the captured graph (eval mode); set it to 0",
    "gradient_checkpointing True": "needs modules, which the graph replaces; remove it",
    "compute bfloat16": "is too coarse for the activation grids; use float32",
    "mergeable True": "changes the integers at each step, but the graph holds the base's integers",
}
Rate = Annotated[float, Field(gt=0, le=1)]  # AdamW changes a weight by about this much per step


def _start(text: str) -> str:
    def check(text: str) -> None:
        path = source_path(text)
        if not path.exists() and not is_hub_id(text):
            raise SourceError(
                f"adapter {text!r} does not exist{looked_for(text, path)}. Give the name of an "
                "adapter in this recipe, a folder with adapter_config.json, package:NAME/PATH for "
                "a folder inside an installed package, or a hub id"
            )

    # What reads as a name is one of an adapter in the recipe, which is checked with all sections.
    return text if re.fullmatch(r"[\w.-]+", text) else located(text, check)


class Adapter(Section):
    """Step 2: an adapter."""

    name: Name
    """name of the adapter and of its folder: letters, digits, _ and -"""
    data: Data | None = None
    """the adapter's own text; missing keys come from the data section"""
    continue_from: Annotated[str, AfterValidator(_start)] | None = None
    """trained adapter to continue, with its shape and dropout: one listed before this one, a folder
    of PEFT or mlx-lm, package:NAME/PATH or a hub id"""
    objective: Literal["text", "recovery"] = "text"
    """text: predict the next token; recovery: also match the float model, as a start for other
    adapters"""
    unknown_base: Literal["refuse", "accept", "other"] = "refuse"
    """for continue_from. accept: its base may be unknown, as with PEFT; other: its base may
    differ"""
    rank: Rank = 16
    """inner dimension of lora_B @ lora_A"""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """the adapter is scaled by alpha / rank"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout before lora_A"""
    target_modules: str | list[str] = "all-linear"
    """layers that get an adapter: module names, or a regular expression over whole paths"""
    target_parameters: list[str] = []
    "fused experts that get an adapter, by the end of their names: mlp.experts.down_proj"
    rslora: bool = False
    """scale by alpha / sqrt(rank) instead"""
    init: Literal["zero", "svd", "qera"] = "zero"
    """zero: lora_B is zero; svd: correct the error of the weights; qera: correct the error of layer
    outputs (best). svd and qera need the float weights. Default: from preset; zero with solver
    keep, dora, mergeable or continue_from"""
    init_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """share of the ranks that carry the correction; the rest start at zero. Default: 0.5; 1 for 2
    bits"""
    dora: bool = False
    """DoRA: also train the norm of every output"""
    mergeable: bool = False
    """train so that `qwlora merge` is lossless. Cannot be switched at runtime: export with
    onnx_each or aimet, or use the merged model as model.source"""
    rank_pattern: dict[str, Rank] = {}
    """ranks for some layers, by the end of the module path or a regular expression"""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """alphas for some layers, as in rank_pattern"""
    layers: list[NotNegative] | None = None
    """numbers of the transformer layers that get an adapter. Default: all"""
    steps: NotNegative = 60
    """optimizer steps; 0 uses continue_from unchanged"""
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """passes over the training sequences, instead of steps"""
    batch_sequences: Count = 1
    """sequences per forward pass, over all processes"""
    accumulation_steps: Count = 1
    """forward passes per optimizer step"""
    learning_rate: Rate = 5e-4
    """peak learning rate of AdamW"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """weight decay of AdamW"""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """course of the learning rate"""
    warmup_steps: NotNegative = 5
    """steps from zero to the peak learning rate"""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """largest gradient norm; 0 disables clipping"""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """training precision. auto: bfloat16 if the device has it, but float32 in workflow qwa-lora"""
    gradient_checkpointing: bool = False
    """recompute activations: about a quarter of the memory, 15 percent more time"""
    evaluation_steps: Count | None = None
    """steps between evaluations on held-out text; the best adapter is kept. Default: never"""
    patience: Count | None = None
    """stop after this many evaluations without improvement"""
    divergence: Literal["stop", "ignore"] = "stop"
    """if the loss stays far above its first value. stop: end with an error; ignore: keep going
    unless it is NaN"""
    report_to: list[str] = []
    """loggers of transformers: tensorboard, wandb, mlflow"""
    checkpoint_steps: Count = 10
    """steps between checkpoints for resuming"""

    def lora_shape(self) -> LoraShape:
        """The shape that `attach` takes."""
        from qwlora.adapter.attach import LoraShape

        return LoraShape(**{key: value for key, value in self if key in SHAPE})

    @property
    def step_sequences(self) -> int:
        """The sequences of an optimizer step."""
        return self.batch_sequences * self.accumulation_steps

    def steps_on(self, sequences: int) -> int:
        """The optimizer steps on a text with so many sequences."""
        if self.epochs is None:
            return self.steps
        return math.ceil(self.epochs * sequences / self.step_sequences)

    def length(self, sequences: int) -> str:
        """How long it is trained on a text with so many sequences, in words."""
        steps = self.steps_on(sequences)
        plural, epochs = "s" if steps > 1 else "", steps * self.step_sequences / sequences
        return f"{steps:,} step{plural} = {epochs:.2g} epochs"

    def training_settings(self, seed: int, sequences: int) -> TrainingSettings:
        from qwlora.adapter.train import TrainingSettings

        others = {f.name for f in fields(TrainingSettings)} - {"steps", "seed"}
        settings = {name: getattr(self, name) for name in others}
        steps = self.steps_on(sequences)
        # Validation has compared them with `steps`; those of epochs are known only now.
        settings["warmup_steps"] = min(self.warmup_steps, max(0, steps - 1))
        return TrainingSettings(steps=steps, seed=seed, **settings)

    def without_graph(self) -> Iterator[str]:
        """Settings that cannot be trained through a captured graph, and what to use instead."""
        settings = {f"{key} {value}" for key, value in self}
        settings |= {"dropout"} if self.dropout else set()
        for setting, reason in _NOT_IN_GRAPH.items():
            if setting in settings:
                yield f"workflow qwa-lora: adapter {self.name}: {setting} {reason}"

    @field_validator("target_modules", "rank_pattern", "alpha_pattern")
    @classmethod
    def _are_regular(cls, value: Any) -> Any:
        patterns = [value] if isinstance(value, str) else value if isinstance(value, dict) else []
        problems = [pattern_problem(text, is_end=isinstance(value, dict)) for text in patterns]
        if any(problems):
            raise ValueError("; ".join(filter(None, problems)))
        return value

    def problems(self) -> Iterator[str]:
        continues = self.continue_from is not None
        shape = sorted(self.model_dump(include=SHAPE, exclude_unset=True, exclude_defaults=True))
        if continues and shape:
            yield f"{', '.join(shape)}: continue_from already sets these. Remove them"
        if self.epochs is not None and self.steps != type(self).model_fields["steps"].default:
            yield f"give either steps ({self.steps}) or epochs ({self.epochs:g}), not both"
        if not continues and self.steps == 0:
            yield (
                "steps is 0, so nothing would be trained. Set steps, or use an existing adapter "
                "with continue_from"
            )
        keys = ("dropout", "dora", "layers")
        named = [key for key in keys if getattr(self, key) not in (0.0, False, None)]
        if self.target_parameters and named:
            yield (
                f"{', '.join(named)}: PEFT does not support this together with target_parameters; "
                "remove one of them"
            )
        others = [k for k in ("dropout", "dora", "target_parameters") if getattr(self, k)]
        others += ["init"] if self.init != "zero" else []
        if self.mergeable and others:
            yield (
                f"mergeable cannot be combined with {', '.join(others)}: the merged integers "
                "cannot store it. Remove one of them"
            )
        if self.init != "zero" and (self.dora or continues):
            yield (
                f"init {self.init} cannot be combined with dora or continue_from; remove it, or "
                f"remove {'continue_from' if continues else 'dora'}"
            )
        has_steps = self.steps and self.epochs is None
        if has_steps and self.warmup_steps >= self.steps and self.schedule != "constant":
            yield f"lower warmup_steps ({self.warmup_steps}) below steps ({self.steps})"
        if self.patience is not None and self.evaluation_steps is None:
            yield "patience needs evaluations. Set evaluation_steps"
