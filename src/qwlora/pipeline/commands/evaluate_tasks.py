"""`qwlora evaluate DIR --tasks ...`: scores of a job's models on tasks of lm-eval.

The scores are results (`tasks`) of the stage that made the model, and are dropped when it runs
again:

    float           quantize, whose key covers the model's files
    base            quantize
    adapted/NAME    train/NAME
    simulated/NAME  calibrate/NAME
    TARGET/NAME     export/TARGET/NAME
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError
from qwlora.export.registry import TARGETS
from qwlora.pipeline.commands.model_names import JobModels, ModelName, model_name
from qwlora.pipeline.commands.open_job import JobState, add_task_scores
from qwlora.pipeline.plan.plan import has_float_model
from qwlora.pipeline.running.new_context import quiet_libraries
from qwlora.system.progress import Track, untracked


def evaluate_tasks(
    folder: Path,
    tasks: str,
    models: str | None = None,
    limit: int | None = None,
    track: Track = untracked,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score the models of the job in `folder`, and add the scores to its results.

    Args:
        tasks: names of lm-eval's tasks, or YAML files, separated by commas.
        models: names as in `model_name`, separated by commas. Default: all that the job has and
            whose runtime is installed.
        limit: documents of each task; None for all.
        say: receives a line for each model that is left out.

    Returns:
        The key `tasks` of results.json.

    Raises:
        MissingExtraError: lm-eval is not installed.
        SourceError: a task cannot be loaded.
        DirectoryError: see `JobModels.check`; or the job has no model yet.
    """
    job = JobModels(folder)
    chosen = (
        [model_name(name, job.adapters) for name in _split(models)]
        if models is not None
        else _all_models(job, say)
    )
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


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _all_models(job: JobModels, say: Callable[[str], None]) -> list[ModelName]:
    names = [ModelName("float", None)] if has_float_model(job.recipe) else []
    names.append(ModelName("base", None))
    for stage in ("adapted", "simulated", *job.recipe.export.targets):
        names += job.models(stage)
    found = []
    for name in names:
        try:
            job.check(name)
        except DirectoryError:
            continue  # not made yet
        target = TARGETS.get(name.stage)
        if target is not None and (missing := target.missing()):
            say(f"{name}: left out, {missing}")
        else:
            found.append(name)
    return found
