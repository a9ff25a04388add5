"""Open a job that exists, and its models under the names that results.json uses.

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

import copy
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwlora.errors import DirectoryError, RecipeError, listed, suggestion
from qwlora.export.registry import TARGETS
from qwlora.export.target import members
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.output_path import as_directory_errors
from qwlora.pipeline.plan.plan import (
    JobTexts,
    UnreadTexts,
    has_float_model,
    make_plan,
    resolve_compute,
)
from qwlora.pipeline.plan.stale_stages import (
    JobState,
    command_line,
    find_stale,
    job_recipe,
    run_line,
)
from qwlora.pipeline.results.results import last_status, write_results
from qwlora.pipeline.running import new_context, quiet_libraries
from qwlora.system.progress import Track, untracked

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from qwlora.pipeline.running.loaded_models import JobContext

STAGES = ("float", "base", "adapted", "simulated", *TARGETS)
_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


def open_job(
    folder: Path,
    adapter: str | None = None,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
) -> tuple[JobContext, str]:
    """The context of an existing job, and the name of one of its trained adapters.

    Args:
        adapter: default: the first in the recipe.
        changes: changes to the job's recipe for this context only; see `load_recipe`.

    Raises:
        DirectoryError: there is no such job or trained adapter, or files of the adapter or the base
            are missing or modified.
        RecipeError: a change is of something else than the simulation and the counts of sequences:
            the base and the adapters exist already.
        FingerprintError: the adapter was trained on a different base.
    """
    recipe = job_recipe(folder, changes)
    keys = {change: change.partition("=")[0] for change in changes}
    refused = [c for c, k in keys.items() if k.split(".")[0] != "simulation" and k not in _COUNTS]
    if refused:
        options = [part for change in refused for part in ("--set", change)]
        problem = (
            f"{shlex.join(options)}: this command can only change simulation.* and "
            f"{' and '.join(_COUNTS)}. Run the job with the change first: "
            f"{run_line(folder, *options)}"
        )
        raise RecipeError(str(folder / "recipe.yaml"), [problem])
    name = adapter or recipe.adapters[0].name
    if not (folder / "adapters" / name).is_dir():
        known = ", ".join(adapter.name for adapter in recipe.adapters)
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}; the recipe has {known}. Train it: "
            f"{command_line('train', folder)}"
        )
    job = JobState(folder, recipe)
    if f"train/{name}" in {stage.name for stage in job.plan}:
        job.require(f"train/{name}", f"adapter {name!r}", whatever_inputs=True)
    context = new_context(job.recipe, job.texts, folder, track)
    from qwlora.adapter.adapter_folder import check_adapter

    check_adapter(folder / "adapters" / name, context.base_fingerprint)
    return context, name


def check_current(context: JobContext, stages: Iterable[str]) -> None:
    """Check that stages of the context's job, and all that they need, are current."""
    job = JobState(context.path, context.recipe, context.texts)
    for stage in stages:
        job.require(stage)


def is_calibrated(context: JobContext, name: str) -> bool:
    """Whether adapter `name` is calibrated in the context's job.

    Raises:
        DirectoryError: the calibration is of another recipe, adapter or base.
    """
    if not (context.path / "simulation" / name).is_dir():
        return False
    check_current(context, [f"calibrate/{name}"])
    return True


@dataclass(frozen=True)
class ModelName:
    """A model of a job: its stage, and its adapter or use case unless it is `float` or `base`."""

    stage: str
    adapter: str | None = None

    @property
    def is_use_case(self) -> bool:
        """Whether `adapter` is a use case: none, one or several adapters."""
        return self.stage in TARGETS and TARGETS[self.stage].has_cases

    @property
    def adapters(self) -> list[str]:
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
        if self.stage in TARGETS:
            return self.export_stages[-1]
        made = {"adapted": f"train/{self.adapter}", "simulated": f"calibrate/{self.adapter}"}
        return made.get(self.stage, "quantize")

    def __str__(self) -> str:
        return self.stage if self.adapter is None else f"{self.stage}/{self.adapter}"


def model_name(text: str, adapters: Iterable[str]) -> ModelName:
    """Parse the name of a model; see the module's docstring."""
    known = list(adapters)
    stage, _, adapter = text.partition("/")
    if text in ("float", "base"):
        return ModelName(text)
    if adapter and stage in STAGES[2:]:
        return ModelName(stage, adapter)
    if text in known:
        return ModelName("adapted", text)
    names = ["float", "base", *known]
    raise DirectoryError(f"there is no model or adapter {text!r}{suggestion(text, names)}")


class JobModels:
    """Opens the models of the job in `folder`. What is not there is a DirectoryError."""

    def __init__(self, folder: Path):
        self.folder, self.recipe = folder, job_recipe(folder)

    @property
    def adapters(self) -> list[str]:
        return [adapter.name for adapter in self.recipe.adapters]

    def models(self, stage: str) -> list[ModelName]:
        """The models of a stage other than `float` and `base`: one an adapter or use case."""
        names = self.recipe.use_cases() if ModelName(stage).is_use_case else self.adapters
        return [ModelName(stage, name) for name in names]

    def name(self, stage: str, adapter: str | None) -> ModelName:
        """The model of a stage.

        Args:
            adapter: adapter or use case. Default: the first in the recipe.
        """
        if stage not in STAGES:
            raise DirectoryError(f"there is no stage {stage!r}{suggestion(stage, STAGES)}")
        if stage in ("float", "base"):
            return ModelName(stage)
        return self.models(stage)[0] if adapter is None else ModelName(stage, adapter)

    def check(self, name: ModelName) -> None:
        """Check that the model's files are there, before anything large is loaded."""
        if name.stage == "float":
            return
        job, targets = f"{str(self.folder)!r}", self.recipe.export.targets
        if name.stage in TARGETS and name.stage not in targets:
            raise DirectoryError(
                f"{job} is not exported to {name.stage}: export.targets of its recipe.yaml has "
                f"{listed(targets)}. Add {name.stage} there, then run: "
                f"{command_line('export', self.folder)}"
            )
        kind = "use case" if name.is_use_case else "adapter"
        if name.adapter is not None and name not in self.models(name.stage):
            known = [str(model.adapter) for model in self.models(name.stage)]
            raise DirectoryError(
                f"{job} has no {kind} {name.adapter!r}{suggestion(name.adapter, known)}"
            )
        needed = [
            ("base", "quantize", "has no base yet"),
            *(
                (f"adapters/{a}", "train", f"has not trained adapter {a!r} yet")
                for a in name.adapters
            ),
        ]
        if name.stage == "simulated":
            problem = f"has not calibrated adapter {name.adapter!r} yet"
            needed.append((f"simulation/{name.adapter}", "calibrate", problem))
        if name.stage in TARGETS:
            files = "use cases" if name.is_use_case else f"adapter {name.adapter!r}"
            problem = f"has not exported {files} to {name.stage} yet"
            needed.append((name.export_stages[-1], "export", problem))
        if missing := [entry for entry in needed if not (self.folder / entry[0]).is_dir()]:
            verbs = dict.fromkeys(verb for _, verb, _ in missing)
            commands = " && ".join(command_line(verb, self.folder) for verb in verbs)
            raise DirectoryError(f"{job} {missing[0][2]}. Run first: {commands}")

    def open(self, name: ModelName, exact: bool = False) -> PreTrainedModel:
        """Load a model.

        Args:
            exact: compute as evaluation does; else packed layers may use torch's integer kernels,
                see `nn/few_row_kernels.py`.

        Raises:
            SourceError: the float model cannot be loaded, or there is none.
            FingerprintError: a file was changed, or the adapter is of another base.
            ExportError: the runtime refuses the files.
        """
        self.check(name)
        if name.stage in ("simulated", *TARGETS):
            return self._open_graph(name)
        context = new_context(self.recipe, UnreadTexts(self.recipe), self.folder, untracked)
        if name.stage == "float":
            return context.float_model()
        from qwlora.nn.few_row_kernels import use_few_row_kernels_

        # the `generate` of an adapter passes everything on to the model that it wraps
        model: Any = context.base() if name.adapter is None else context.adapted(name.adapter)
        if not exact:
            use_few_row_kernels_(model)
        return cast("PreTrainedModel", model.eval())

    def _open_graph(self, name: ModelName) -> PreTrainedModel:
        context, adapter = open_job(self.folder, next(iter(name.adapters), None))
        if name.stage == "simulated":
            is_calibrated(context, adapter)
            return context.simulation(adapter).as_model()
        from transformers.modeling_outputs import CausalLMOutput

        from qwlora.simulation.simulated_model import SimulatedModel

        check_current(context, name.export_stages)
        runtime = TARGETS[name.stage].open(self.folder / "export" / name.stage, name.adapter)

        def run(input_ids: Tensor, **_: Any) -> CausalLMOutput:
            return CausalLMOutput(logits=runtime.logits(input_ids))  # of the whole sequence

        return SimulatedModel(run, context.skeleton())

    def tokenizer(self, name: ModelName) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that the recipe sets for the adapter's text."""
        from qwlora.formats.model_source import load_tokenizer

        base, model = self.folder / "base", self.recipe.model
        source = str(base) if base.is_dir() else model.source
        tokenizer = load_tokenizer(source, model.trust_remote_code)
        data = self.recipe.data_of(next(iter(name.adapters), None))
        if (template := data.read_template()) is not None:
            tokenizer.chat_template = template
        return tokenizer


def evaluate_tasks(
    folder: Path,
    tasks: str,
    models: str | None = None,
    limit: int | None = None,
    track: Track = untracked,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score the models of the job in `folder` on tasks of lm-eval, and add the scores to its
    results: to those of the stage `made_by` of the model.

    Args:
        tasks: names of lm-eval's tasks, or YAML files, separated by commas.
        models: names as in `model_name`, separated by commas. Default: all that the job has and
            whose runtime is installed.
        limit: documents of each task; None for all.
        say: receives a line for each model that is left out.

    Returns:
        The key `tasks` of results.json.
    """
    job = JobModels(folder)
    if models is None:
        chosen = _all_models(job, say)
    else:
        chosen = [model_name(name, job.adapters) for name in _split(models)]
    for name in chosen:
        job.check(name)
    state = JobState(folder, job.recipe)
    state.directory.check_writable()
    for stage in dict.fromkeys(name.made_by for name in chosen):
        state.require(stage)
    quiet_libraries()
    from qwlora.analysis.task_harness import load_tasks, score_tasks

    loaded = load_tasks(_split(tasks))
    for name in chosen:  # one model in memory at a time
        model = job.open(name, exact=True)
        scores = score_tasks(model, job.tokenizer(name), loaded, limit, f"tasks, {name}", track)
        del model
        results = add_task_scores(folder, str(name), name.made_by, scores)
    return dict(results["tasks"])


def add_task_scores(folder: Path, model: str, stage: str, scores: dict[str, Any]) -> dict[str, Any]:
    """Add scores of tasks to the results of a job, and rewrite results.json and report.html.

    They are results of the stage that made the model: dropped when it runs again. Scores of other
    tasks stay.

    Args:
        model: its name in results.json, such as `adapted/NAME`.
        scores: by task.
    """
    recipe = resolve_compute(job_recipe(folder))
    with Directory.open(folder, recipe) as directory:
        plan = make_plan(recipe, JobTexts(recipe), directory.digests)
        results = copy.deepcopy(directory.records[stage].results)
        tasks = results.setdefault("tasks", {})
        for part in model.split("/", 1):
            tasks = tasks.setdefault(part, {})
        tasks.update(scores)
        stale = find_stale(plan, directory)
        with as_directory_errors(folder):
            directory.set_results(stage, results)
        return write_results(directory, recipe, plan, stale, last_status(folder))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _all_models(job: JobModels, say: Callable[[str], None]) -> list[ModelName]:
    names = [ModelName("float")] if has_float_model(job.recipe) else []
    names.append(ModelName("base"))
    for stage in ("adapted", "simulated", *job.recipe.export.targets):
        names += job.models(stage)
    chosen = []
    for name in names:
        try:
            job.check(name)
        except DirectoryError:
            continue  # not made yet
        target = TARGETS.get(name.stage)
        if target is not None and (missing := target.missing()):
            say(f"{name}: left out, {missing}")
        else:
            chosen.append(name)
    return chosen
