"""Open a job that exists, and its models under the names that results.json uses.

    float              the model as loaded, before step 1
    base               the frozen base
    adapted/NAME       base and adapter; NAME alone means the same
    simulated/NAME     base, adapter and activations as integers
    TARGET/NAME        exported files in their runtime, such as onnx/NAME
    TARGET/base        the exported base alone, where adapters have files of their own
    qairt/CASE         a use case, such as qairt/NAME, qairt/NAME+NAME or qairt/none

What is before the slash is the kind; alone, it means the first adapter or use case of the recipe.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from qwlora.errors import DirectoryError, MissingExtraError, RecipeError, listed, suggestion
from qwlora.pipeline.job import OpenJob, command_line, job_recipe, sources_of
from qwlora.pipeline.results import last_status, write_results
from qwlora.pipeline.stages import new_context
from qwlora.pipeline.store import NAME
from qwlora.recipe.recipe_file import target_of
from qwlora.system.parameter_names import BASE
from qwlora.system.progress import Track, untracked
from qwlora.system.quiet import quiet_libraries
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import NONE, members

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.modeling_outputs import CausalLMOutput

    from qwlora.pipeline.stages.job_context import JobContext
    from qwlora.simulation.simulated_model import SimulatedModel
    from qwlora.targets.target import Runtime

KINDS = ("float", "base", "adapted", "simulated", *TARGETS)
FASTEST = ("gguf", "genai")  # measured: docs/benchmarks.md
_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


@dataclass(frozen=True)
class ModelName:
    """A model of a job: its kind, and its adapter or use case unless it is `float` or `base`."""

    kind: str
    adapter: str | None = None

    @property
    def is_use_case(self) -> bool:
        return self.kind in TARGETS and TARGETS[self.kind].has_cases

    @property
    def adapters(self) -> list[str]:
        if self.adapter is None or self.adapter == BASE:
            return []
        return members(self.adapter) if self.is_use_case else [self.adapter]

    @property
    def made_by(self) -> str:
        if self.kind in TARGETS:
            return TARGETS[self.kind].stages(self.kind, str(self.adapter))[-1]
        stages = {"adapted": f"train/{self.adapter}", "simulated": f"calibrate/{self.adapter}"}
        # No stage makes the float model, but `quantize` has the digests of its files.
        return stages.get(self.kind, "quantize")

    def __str__(self) -> str:
        return self.kind if self.adapter is None else f"{self.kind}/{self.adapter}"


class JobModels(OpenJob):
    """An existing job and its models. What is not there is a DirectoryError."""

    def new_context(self) -> JobContext:
        # One for each model that is opened: what it loads is released with it.
        sources = sources_of(self.recipe, self.store, self.track, reads=True)
        return new_context(self.recipe, sources, self.folder, self.track)

    def models(self, kind: str) -> list[ModelName]:
        if kind in ("float", "base"):
            return [ModelName(kind)]
        if ModelName(kind).is_use_case:
            return [ModelName(kind, case) for case in self.recipe.use_cases()]
        return [ModelName(kind, adapter.name) for adapter in self.recipe.adapters]

    def named(self, names: str | None) -> list[ModelName]:
        """Models by their names, separated by commas. Default: the first adapter."""
        adapters = {str(model.adapter): model for model in self.models("adapted")}
        first = {kind: self.models(kind)[0] for kind in KINDS}
        known = first | adapters | {kind: ModelName(kind) for kind in ("float", "base")}
        models = []
        for name in _split("adapted" if names is None else names):
            kind, _, adapter = name.partition("/")
            if name not in known and (not adapter or kind not in KINDS[2:]):
                similar = suggestion(name, list(known))
                raise DirectoryError(f"no model or adapter is called {name!r}{similar}")
            models.append(known.get(name) or ModelName(kind, adapter))
        if not models:
            raise DirectoryError("name a model, for example: base,first")
        return models

    def one_named(self, name: str | None) -> ModelName:
        model, *others = self.named(name)
        if others:
            raise DirectoryError(f"give one model, not {name!r}")
        return model

    def check(self, name: ModelName) -> None:
        """Check that the model's files are there."""
        if name.kind == "float":
            return
        job, targets = f"{str(self.folder)!r}", self.recipe.export.targets
        problem, wanted = "", [name.kind]
        if name.kind in TARGETS and name.kind not in targets:
            problem = f"is not exported to {name.kind}"
        elif name.kind == "simulated" and not self.recipe.is_simulated:
            problem = "has no simulations, because no target quantizes activations"
            wanted = [known for known, target in TARGETS.items() if target.is_simulated]
        if problem:
            raise DirectoryError(
                f"{job} {problem}: export.targets of its recipe.yaml has {listed(targets)}. Add "
                f"{' or '.join(wanted)} there, then run: {command_line('run', self.folder)}"
            )
        known = [str(model.adapter) for model in self.models(name.kind)]
        known += [BASE] * (name.kind in TARGETS and TARGETS[name.kind].has_base)
        if name.adapter is not None and name.adapter not in known:
            kind = "use case" if name.is_use_case else "adapter"
            raise DirectoryError(
                f"{job} has no {kind} {name.adapter!r}{suggestion(name.adapter, known)}"
            )
        needed = {"base": "quantize", **{f"adapters/{a}": "train" for a in name.adapters}}
        if name.kind == "simulated":
            needed[f"simulation/{name.adapter}"] = "calibrate"
        elif name.kind in TARGETS:
            needed[name.made_by] = "export"
        if missing := [part for part in needed if not (self.folder / part).is_dir()]:
            verbs = dict.fromkeys(needed[part] for part in missing)
            commands = " && ".join(command_line(verb, self.folder) for verb in verbs)
            raise DirectoryError(f"{job} has no {', '.join(missing)} yet. Run first: {commands}")

    def is_calibrated(self, adapter: str) -> bool:
        """Whether an adapter is calibrated, and the recipe, without changes, still asks for it."""
        folder = self.folder / "simulation" / adapter
        if self.changes or not (self.recipe.is_simulated and folder.is_dir()):
            return False
        # Nobody should see figures of another recipe, adapter or base: that is an error.
        self.require(f"calibrate/{adapter}")
        return True

    def fastest(self, name: ModelName, runtime: str | None) -> ModelName:
        """The exported files that compute the base or an adapter; the model itself in torch.

        Args:
            runtime: a target, a program that runs its files, or `torch`. Default: the fastest one
                whose files are up to date and whose program is installed.
        """
        if name.kind not in ("base", "adapted"):
            if runtime not in (None, "torch"):
                raise DirectoryError(f"--runtime {runtime} works only for the base and adapters")
            return name
        if runtime not in (None, "torch"):
            if (target := target_of(str(runtime))) is None:
                known = ["torch", *self.recipe.export.targets]
                raise DirectoryError(
                    f"--runtime {runtime!r} is unknown{suggestion(runtime, known)}"
                )
            case = NONE if TARGETS[target].has_cases else BASE
            return ModelName(target, name.adapter or case)
        for target in FASTEST if runtime is None else ():
            files = ModelName(target, name.adapter or BASE)
            try:
                self.check(files)
                self.require(files.made_by)
                TARGETS[target].require_packages()
            except (DirectoryError, MissingExtraError):
                continue
            return files
        return name

    def what_runs(self, name: ModelName, exact: bool) -> str:
        """The model's name; for exported files also which ones run, in which program, and how."""
        if name.kind not in TARGETS:
            return f"{name} in PyTorch"
        from qwlora.targets.proof.prove import client

        target, folder = TARGETS[name.kind], self.folder / "export"
        target.require_packages()
        how = "not on the device" if target.chip else (exact and target.exact) or target.shipped
        program, version = [*client(target).items()][-1]
        where = f"{target.runtime or 'ONNX Runtime'} ({program} {version})"
        parts = target.parts(folder / name.kind, str(name.adapter)).values()
        files = (next(p.glob("*.gguf"), p) for p in parts)  # which many know by that name
        return f"{name}, {how}: {where}, {' with '.join(str(f.relative_to(folder)) for f in files)}"

    def open(self, name: ModelName, exact: bool = False) -> PreTrainedModel:
        """Load a model. Unless it is `exact`, exported files run as they are shipped."""
        self.check(name)
        if name.kind in ("simulated", *TARGETS):
            self.require(name.made_by)
        context = self.new_context()
        if name.kind == "float":
            return context.float_model()
        if name.kind == "simulated":
            # Captured without a key-value cache: each new token runs the whole sequence again.
            return context.simulation(str(name.adapter)).as_model()
        if name.kind in TARGETS:
            bundle = self.folder / "export" / name.kind
            runtime = TARGETS[name.kind].open(bundle, name.adapter, as_shipped=not exact)
            return runtime_model(runtime, context.skeleton())
        from qwlora.nn.packed_layer import unpack_linears_

        # PEFT's `generate` passes everything on to the model that it wraps.
        model: Any = context.base() if name.adapter is None else context.adapted(name.adapter)
        unpack_linears_(model)
        return cast("PreTrainedModel", model.eval())

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


def open_job(
    folder: Path,
    adapter: str | None = None,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
    device: str | None = None,
) -> tuple[JobModels, str]:
    """An existing job, and the name of one of its trained adapters. Changes are not stored.

    Raises:
        DirectoryError: there is no such job or trained adapter, or files of the adapter or the base
            are missing or modified.
        RecipeError: a change is of something else than the simulation and the counts of sequences.
        FingerprintError: the adapter was trained on a different base.
    """
    job = JobModels(folder, changes, track, device)
    # The base and the adapters exist already, so no other setting can have an effect.
    keys = {change: change.partition("=")[0] for change in changes}
    refused = [c for c, k in keys.items() if k.split(".")[0] != "simulation" and k not in _COUNTS]
    if refused:
        options = [part for change in refused for part in ("--set", change)]
        problem = (
            f"{shlex.join(options)}: this command can only change simulation.* and "
            f"{' and '.join(_COUNTS)}. Run the job with the change first: "
            f"{command_line('run', folder, *options)}"
        )
        raise RecipeError(str(folder / "recipe.yaml"), [problem])
    model = job.models("adapted")[0] if adapter is None else ModelName("adapted", adapter)
    job.check(model)
    name = str(model.adapter)
    job.require(model.made_by, f"adapter {name!r}", whatever_inputs=True)
    from qwlora.adapter.adapter_files import check_adapter

    check_adapter(folder / "adapters" / name, job.new_context().base_fingerprint)
    return job, name


def evaluate_tasks(
    folder: Path,
    tasks: str,
    models: str | None = None,
    limit: int | None = None,
    track: Track = untracked,
    say: Callable[[str], None] = lambda line: None,
    device: str | None = None,
) -> dict[str, Any]:
    """Score models of the job in `folder` on tasks of lm-eval, and add the scores to its results.

    Args:
        tasks: names of lm-eval's tasks, or YAML files, separated by commas.
        models: as in `JobModels.named`. Default: all that are there and can run.
        limit: documents of each task; None for all.
    """
    job = JobModels(folder, device=device)
    chosen = _all_models(job, say) if models is None else job.named(models)
    for name in chosen:
        job.check(name)
    job.store.check_writable()
    for stage in dict.fromkeys(name.made_by for name in chosen):
        job.require(stage)
    quiet_libraries()
    from qwlora.analysis.task_harness import load_tasks, score_tasks

    loaded = load_tasks(_split(tasks))
    for name in chosen:
        say(job.what_runs(name, exact=False))
        model = job.open(name, exact=name.kind not in TARGETS)
        scores = score_tasks(model, job.tokenizer(name), loaded, limit, f"tasks, {name}", track)
        # Memory holds one model at a time. Scores are stored after each: the next may take hours.
        del model
        results = add_task_scores(job, name, scores)
    return dict(results["tasks"])


def add_task_scores(job: JobModels, name: ModelName, scores: dict[str, Any]) -> dict[str, Any]:
    """Add scores by task to the results of the stage that made the model."""
    store, place = job.store, next(s.place for s in job.judge.plan if s.name == name.made_by)
    with store.locked():
        # Read under the lock: scores of other tasks stay.
        results = copy.deepcopy(store.records[place].results)
        by_model = results.setdefault("tasks", {}).setdefault(name.kind, {})
        if name.adapter is not None:
            is_fixed = name.is_use_case or name.adapter == BASE
            by_model = by_model.setdefault(name.adapter if is_fixed else NAME, {})
        by_model.update(scores)
        store.change(place, results=results)
        job.judge.again()
        return write_results(job.judge, job_recipe(job.folder), last_status(job.folder))


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _all_models(job: JobModels, say: Callable[[str], None]) -> list[ModelName]:
    kinds = ["float"] if job.sources.holds_floats else []
    kinds += ["base", "adapted", "simulated", *job.recipe.export.targets]
    chosen = []
    for name in [model for kind in kinds for model in job.models(kind)]:
        try:
            job.check(name)
        except DirectoryError:
            continue  # not made yet
        target = TARGETS.get(name.kind)
        if target is not None and (missing := target.missing()):
            say(f"{name}: left out, {missing}")
        else:
            chosen.append(name)
    return chosen


def runtime_model(runtime: Runtime, like: PreTrainedModel) -> SimulatedModel:
    """A model with the configuration of `like` whose logits `runtime` computes."""
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    from qwlora.simulation.simulated_model import SimulatedModel

    ids = torch.empty(1, 0, dtype=torch.int64)  # of the last call for one token
    cache: Any = {}

    def run(input_ids: Tensor, logits_to_keep: int | Tensor = 0, **_: Any) -> CausalLMOutput:
        nonlocal ids, cache
        if logits_to_keep != 1:
            ids, cache = ids[:, :0], {}  # a runtime with one cache uses it for this sequence
            return CausalLMOutput(logits=runtime.logits(input_ids))
        # Greedy decoding repeats the text with one more token, which is all that is new to the
        # cache. After any other text, the cache is of no use.
        known = ids.shape[1]
        if input_ids.shape[1] <= known or not torch.equal(input_ids[:, :known], ids):
            known, cache = 0, {}
        logits, cache = runtime.extend(input_ids[:, known:], cache)
        ids = input_ids
        return CausalLMOutput(logits=logits)

    return SimulatedModel(run, like, keeps_logits=True)
