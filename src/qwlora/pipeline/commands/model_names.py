"""The models of a job under the names that results.json uses, ready for `generate`.

    float              the model as loaded, before step 1
    base               the frozen base
    adapted/NAME       base and adapter; NAME alone means the same
    simulated/NAME     base, adapter and activations as integers
    TARGET/NAME        exported files in their runtime, such as onnx/NAME
    qairt/CASE         a use case, such as qairt/NAME, qairt/NAME+NAME or qairt/none

float, base and adapted use a key-value cache. A simulation is captured without one, and exported
files are run without one, so there each new token runs the whole sequence again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwlora.errors import DirectoryError, listed, suggestion
from qwlora.export.registry import TARGETS
from qwlora.export.target import members
from qwlora.pipeline.commands.open_job import check_current, is_calibrated, job_recipe, open_job
from qwlora.pipeline.plan.stale_stages import command_line
from qwlora.pipeline.running.new_context import quiet_libraries

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STAGES = ("float", "base", "adapted", "simulated", *TARGETS)


@dataclass(frozen=True)
class ModelName:
    """A model of a job: its stage, and its adapter or use case unless it is `float` or `base`."""

    stage: str
    adapter: str | None

    @property
    def is_use_case(self) -> bool:
        """Whether `adapter` is a use case: none, one or several adapters."""
        return self.stage in TARGETS and TARGETS[self.stage].has_cases

    @property
    def adapters(self) -> list[str]:
        """Names of its adapters."""
        if self.adapter is None:
            return []
        return members(self.adapter) if self.is_use_case else [self.adapter]

    @property
    def export_stages(self) -> list[str]:
        """The stages that write its files; the last one has their folder as its name. Of a target
        only."""
        return TARGETS[self.stage].stages(self.stage, str(self.adapter))

    @property
    def made_by(self) -> str:
        """The stage that makes the model; of `float`, the one whose key covers its files."""
        made = {"adapted": f"train/{self.adapter}", "simulated": f"calibrate/{self.adapter}"}
        made |= dict.fromkeys(("float", "base"), "quantize")
        return made.get(self.stage) or self.export_stages[-1]

    def __str__(self) -> str:
        return self.stage if self.adapter is None else f"{self.stage}/{self.adapter}"


def model_name(text: str, adapters: Iterable[str]) -> ModelName:
    """Parse the name of a model; see the module's docstring.

    Raises:
        DirectoryError: it is neither a stage nor an adapter; the message lists similar names.
    """
    known = list(adapters)
    stage, _, adapter = text.partition("/")
    if text in ("float", "base"):
        return ModelName(text, None)
    if adapter and stage in STAGES[2:]:
        return ModelName(stage, adapter)
    if text in known:
        return ModelName("adapted", text)
    names = ["float", "base", *known]
    raise DirectoryError(f"there is no model or adapter {text!r}{suggestion(text, names)}")


class JobModels:
    """Opens the models of one job.

    Args:
        folder: the job's directory.

    Raises:
        DirectoryError: the folder is not a job directory.
        RecipeError: its recipe is not valid.
    """

    def __init__(self, folder: Path):
        self.folder, self.recipe = folder, job_recipe(folder)

    @property
    def adapters(self) -> list[str]:
        """Names of the recipe's adapters."""
        return [adapter.name for adapter in self.recipe.adapters]

    def models(self, stage: str) -> list[ModelName]:
        """The models of a stage other than `float` and `base`: one an adapter or use case."""
        is_use_case = ModelName(stage, None).is_use_case
        names = self.recipe.use_cases() if is_use_case else self.adapters
        return [ModelName(stage, name) for name in names]

    def name(self, stage: str, adapter: str | None) -> ModelName:
        """The model of a stage.

        Args:
            adapter: adapter or use case. Default: the first in the recipe.

        Raises:
            DirectoryError: there is no such stage.
        """
        if stage not in STAGES:
            raise DirectoryError(f"there is no stage {stage!r}{suggestion(stage, STAGES)}")
        if stage in ("float", "base"):
            return ModelName(stage, None)
        return self.models(stage)[0] if adapter is None else ModelName(stage, adapter)

    def check(self, name: ModelName) -> None:
        """Check that the model's files are there, before anything large is loaded.

        Raises:
            DirectoryError: the adapter or use case is unknown, or a step has to run first.
        """
        if name.stage == "float":
            return
        targets = self.recipe.export.targets
        if name.stage in TARGETS and name.stage not in targets:
            raise DirectoryError(
                f"{str(self.folder)!r} is not exported to {name.stage}: export.targets of its "
                f"recipe.yaml has {listed(targets)}. Add {name.stage} there, then run: "
                f"{command_line(['export'], self.folder)}"
            )
        if name.adapter is not None and name not in self.models(name.stage):
            kind = "use case" if name.is_use_case else "adapter"
            known = [str(model.adapter) for model in self.models(name.stage)]
            raise DirectoryError(
                f"{str(self.folder)!r} has no {kind} {name.adapter!r}"
                f"{suggestion(name.adapter, known)}"
            )
        needed = [("base", "quantize", "has no base yet")]
        for adapter in name.adapters:
            made = f"has not trained adapter {adapter!r} yet"
            needed.append((f"adapters/{adapter}", "train", made))
        if name.stage == "simulated":
            made = f"has not calibrated adapter {name.adapter!r} yet"
            needed.append((f"simulation/{name.adapter}", "calibrate", made))
        if name.stage in TARGETS:
            what = "use cases" if name.is_use_case else f"adapter {name.adapter!r}"
            made = f"has not exported {what} to {name.stage} yet"
            needed.append((name.export_stages[-1], "export", made))
        if missing := [entry for entry in needed if not (self.folder / entry[0]).is_dir()]:
            commands = command_line(dict.fromkeys(verb for _, verb, _ in missing), self.folder)
            raise DirectoryError(f"{str(self.folder)!r} {missing[0][2]}. Run first: {commands}")

    def open(self, name: ModelName, exact: bool = False) -> PreTrainedModel:
        """Load a model.

        Args:
            exact: compute as evaluation does; else packed layers may use torch's integer kernels,
                see `nn/few_row_kernels.py`.

        Raises:
            DirectoryError: see `check`; or the files are out of date.
            SourceError: the float model cannot be loaded, or there is none.
            FingerprintError: a file was changed, or the adapter is of another base.
            CalibrationError: the calibration is out of date.
            ExportError: the runtime refuses the files.
        """
        self.check(name)
        quiet_libraries()
        if name.stage in ("simulated", *TARGETS):
            return self._open_graph(name)
        section = self.recipe.model
        if name.stage == "float":
            from qwlora.formats.model_source import load_model

            return load_model(section.source, section.trust_remote_code)
        from qwlora.adapter.adapter_folder import load_adapter
        from qwlora.formats.base_folder import load_base
        from qwlora.nn.few_row_kernels import use_few_row_kernels_

        folder = self.folder / "base"
        model: Any = load_base(folder, trust_remote_code=section.trust_remote_code).eval()
        if name.adapter is not None:
            # its `generate` passes everything on to the model that it wraps
            model = load_adapter(model, self.folder / "adapters" / name.adapter).eval()
        if not exact:
            use_few_row_kernels_(model)
        return cast("PreTrainedModel", model)

    def _open_graph(self, name: ModelName) -> PreTrainedModel:
        context, adapter = open_job(self.folder, next(iter(name.adapters), None))
        if name.stage == "simulated":
            is_calibrated(context, adapter)
            simulated: PreTrainedModel = context.simulation(adapter).as_model()
            return simulated
        from transformers.modeling_outputs import CausalLMOutput

        from qwlora.simulation.simulated_model import SimulatedModel

        check_current(context, name.export_stages)
        runtime = TARGETS[name.stage].open(self.folder / "export" / name.stage, name.adapter)

        def run(input_ids: Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=runtime.logits(input_ids))  # of the whole sequence

        return SimulatedModel(run, context.skeleton())

    def tokenizer(self, name: ModelName) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that the recipe sets for the adapter's text.

        Raises:
            SourceError: it cannot be loaded.
        """
        from qwlora.formats.model_source import load_tokenizer

        base, model = self.folder / "base", self.recipe.model
        source = str(base) if base.is_dir() else model.source
        tokenizer = load_tokenizer(source, model.trust_remote_code)
        data = self.recipe.data_of(next(iter(name.adapters), None))
        if (template := data.read_template()) is not None:
            tokenizer.chat_template = template
        return tokenizer
