"""Run the stages of a recipe in order, skipping those that are current.

`results.json` and `report.html` are rewritten when a stage begins and ends, and while an adapter is
trained (`job_status.py`). They list only current results.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import shlex
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.data.prepared_data import summary
from qwlora.errors import CalibrationError, DirectoryError, RecipeError, described
from qwlora.pipeline.digests import Digests
from qwlora.pipeline.directory import Directory, Record, as_directory_errors
from qwlora.pipeline.distributed import (
    announce,
    announced_stages,
    is_first_process,
    wait_for_others,
)
from qwlora.pipeline.job_progress import JobProgress
from qwlora.pipeline.job_report import write_report
from qwlora.pipeline.job_status import JobStatus
from qwlora.pipeline.job_texts import JobTexts
from qwlora.pipeline.kept_adapters import check_kept, check_none_lost
from qwlora.pipeline.model_cards import write_cards
from qwlora.pipeline.output_path import check_outside_data
from qwlora.pipeline.plan import dependents, make_plan, resolve_compute
from qwlora.pipeline.results import TIMING, collect_results, merge_results
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stages import RUN, VERBS
from qwlora.pipeline.stale_stages import find_stale, upstream
from qwlora.pipeline.stored_scores import keep_scores
from qwlora.progress import Track, untracked
from qwlora.recipe import Recipe
from qwlora.system.compute_precision import SlowComputeWarning
from qwlora.system.memory import peak_rss_bytes, reset_peak_rss, return_freed_memory

Say = Callable[[str], None]
Watch = Callable[[JobProgress], None]

_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


def run(
    recipe: Recipe,
    out: Path,
    verbs: Collection[str] = VERBS,
    track: Track = untracked,
    say: Say = lambda line: None,
    command: Callable[[str], str] | None = None,
    trust_mtime: bool = False,
    replace: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run the stages of `recipe` whose verb is in `verbs` in the directory `out`.

    Current stages are skipped (see `stale_stages.py`), but `verify` always runs when only some
    verbs are requested.

    Args:
        say: receives one line for each stage that is skipped or run.
        command: returns the command line that runs a verb of this job, for messages.
        trust_mtime: see `Digests`.
        replace: replace adapters that were trained with other settings.
        watch: receives the progress of the job before its first stage runs. Without it, nothing
            is estimated.

    Returns:
        The content of `results.json`.

    Raises:
        SourceError, GridError: the model or text cannot be used; nothing was written.
        DirectoryError: `out` cannot be used, a stage that must run first is not current, or an
            adapter would be replaced.
        QwloraError: a stage failed; the stages before it stay finished.
    """
    check_outside_data(out, recipe)
    recipe = resolve_compute(recipe)
    texts = JobTexts(recipe, track)
    digests = Digests(out / ".qwlora" / "digests.json", trust_mtime=trust_mtime, track=track)
    plan = make_plan(recipe, texts, digests)
    if not is_first_process():
        return _join_stages(new_context(recipe, texts, out, untracked), plan)
    try:
        return _run(
            recipe,
            out,
            verbs,
            texts,
            plan,
            digests,
            track,
            say,
            command or (lambda verb: command_line(verb, out)),
            replace,
            watch,
        )
    finally:
        digests.save()
        announce(None)


def _run(
    recipe: Recipe,
    out: Path,
    verbs: Collection[str],
    texts: JobTexts,
    plan: list[Stage],
    digests: Digests,
    track: Track,
    say: Say,
    command: Callable[[str], str],
    replace: bool,
    watch: Watch | None,
) -> dict[str, Any]:
    asked = [stage for stage in plan if stage.verb in verbs]
    always = set() if set(VERBS) <= set(verbs) else {s.name for s in asked if s.verb == "verify"}
    peek = Directory.peek(out, recipe)
    peek.digests = digests
    stale = find_stale(plan, peek)
    if "calibrate" not in verbs:
        asked = _without_uncalibrated(asked, peek, say)
    waiting = [stage for stage in asked if stage.name in stale or stage.name in always]
    _check_needs(plan, waiting, verbs, peek, stale, command)
    if not replace:
        check_none_lost(peek, recipe)
        check_kept(plan, waiting, peek, recipe, stale)
    if not waiting and not peek.is_writable:
        for stage in asked:
            say(_skipped_line(stage))
        earlier = _earlier_results(out)
        kept = {key: earlier[key] for key in ("run", "error") if key in earlier}
        return collect_results(peek, recipe, plan, stale) | kept
    if peek.damaged_records:
        say(f"{peek.private / 'stages.json'} is damaged; stages whose record is lost run again")
    for stage in waiting:
        if stage.artifact is not None:
            peek.check_replaceable(stage.artifact)
    context: Any = None
    progress = JobProgress({}, track)
    if waiting:
        if not peek.is_writable:
            first = waiting[0].name
            raise DirectoryError(
                f"{str(out)!r} is not writable, but {first} must run "
                f"({stale.get(first, 'as requested')}); make the directory writable, or copy it"
            )
        context = _start_context(recipe, texts, out, track, say, {s.verb for s in waiting})
        for name, text in (prepared := context.all_texts()).items():
            say(summary(text.describe(), name if len(prepared) > 1 else None))
        if watch is not None:
            progress = _estimated(context, waiting, track, say)
            context.track = progress.track
            watch(progress)
    with Directory.open(out, recipe) as directory:
        directory.digests = digests
        stale = find_stale(plan, directory)
        directory.forget(keep={s.name for s in plan})
        status = JobStatus(
            lambda keys: _write_results(directory, recipe, plan, stale, keys),
            plan,
            f"qwlora run {out.absolute().name}/recipe.yaml --out {out.absolute().name}",
            _earlier_results(out),
            progress,
        )
        for stage in asked:
            if stage.name not in stale and stage.name not in always:
                directory.drop_work(stage.name, stage.work_key)  # of a run killed at its end
                say(_skipped_line(stage))
                continue
            reason = stale.get(stage.name, "has not run")
            say(f"{stage.name} ...{'' if reason.startswith('has not run') else f' ({reason})'}")
            follows = dependents(plan, stage.name)
            if (
                stage.name not in stale
            ):  # if verification fails now, an earlier success must not remain
                directory.drop(stage.name, *follows)
                stale[stage.name] = "is running"
            with status.failures():
                status.begin(stage.name)
                context = context or new_context(recipe, texts, out, progress.track)
                context.on_training = status.train
                seconds = _run_stage(directory, context, stage, follows)
                progress.end()
            for name in follows:
                if not stale.get(name, "").startswith("has not run"):
                    stale[name] = f"reads {stage.name}, which ran again"
            del stale[stage.name]
            say(f"{stage.name}: done in {seconds:.1f} s")
        return status.end(stale)


def _without_uncalibrated(asked: list[Stage], directory: Directory, say: Say) -> list[Stage]:
    """`asked` without the evaluation of simulations that were never calibrated."""
    kept = []
    for stage in asked:
        if stage.name.startswith("evaluate/simulated/") and stage.needs[0] not in directory.records:
            say(f"{stage.name}: left out, {stage.needs[0]} has not run")
        else:
            kept.append(stage)
    return kept


def _join_stages(context: Any, plan: Sequence[Stage]) -> dict[str, Any]:
    """Join the stages that all processes run together; returns no results."""
    by_name = {stage.name: stage for stage in plan}
    for name in announced_stages():
        stage = by_name[name]
        work = Directory(context.path).work(name, stage.work_key)
        RUN[stage.verb](context, stage, work, work)  # only the first process writes an artifact
    return {}


def _skipped_line(stage: Stage) -> str:
    return f"{stage.name}: skipped, nothing it depends on has changed"


def _run_stage(directory: Directory, context: Any, stage: Stage, follows: Collection[str]) -> float:
    began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    gc.collect()
    return_freed_memory()  # of the stages before
    reset_peak_rss()
    with as_directory_errors(directory.path), directory.scratch() as scratch:
        if stage.verb == "train":
            announce(stage.name)
        results = RUN[stage.verb](
            context, stage, scratch, directory.work(stage.name, stage.work_key)
        )
        wait_for_others()
        seconds = time.perf_counter() - began
        results[TIMING] = {"started": started, "peak_rss_bytes": peak_rss_bytes()}
        if stage.artifact is not None:
            results[TIMING]["bytes"] = sum(
                f.stat().st_size for f in scratch.rglob("*") if f.is_file()
            )
        directory.commit(
            stage.name, Record(stage.key, seconds, results), scratch, stage.artifact, follows
        )
        directory.drop_work(stage.name)
    return seconds


def _start_context(
    recipe: Recipe, texts: JobTexts, out: Path, track: Track, say: Say, verbs: set[str]
) -> Any:
    """The context, after all checks that need no writing."""
    context = new_context(recipe, texts, out, track)
    from qwlora.pipeline.preflight import preflight

    preflight(context, verbs, say)
    return context


def _estimated(context: Any, waiting: Sequence[Stage], track: Track, say: Say) -> JobProgress:
    """The progress of a job whose stages `waiting` will run; says what they need.

    An estimate is no reason to stop a job: without one, every stage counts as equally long.
    """
    from qwlora.pipeline.estimates import estimate, summary_line

    try:
        estimates = estimate(
            context.recipe, waiting, context.path, track, context.holds_float_model
        )
    except Exception as error:
        say(f"no estimate of time and memory: {described(error)}")
        return JobProgress({stage.name: 60.0 for stage in waiting}, track)
    say(summary_line(estimates))
    for problem in estimates.problems:
        say(f"warning: {problem}")
    return JobProgress({e.stage: e.seconds for e in estimates.stages}, track)


def new_context(recipe: Recipe, texts: JobTexts, out: Path, track: Track) -> Any:
    """A `JobContext`. Imports torch and transformers."""
    quiet_libraries()
    from qwlora.pipeline.context import JobContext

    return JobContext(recipe, texts, out, track)


def open_job(
    folder: Path,
    adapter: str | None = None,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
) -> tuple[Any, str]:
    """The context of an existing job, and the name of one of its trained adapters.

    Args:
        adapter: default: the first in the recipe.
        changes: changes to the job's recipe for this context only; see `load_recipe`.

    Raises:
        DirectoryError: the folder is not a job directory, has no such trained adapter, or files of
            the adapter or the base are missing or modified.
        RecipeError: a change would affect the base or the adapters, which exist already.
        FingerprintError: the adapter was trained on a different base.
    """
    recipe = resolve_compute(job_recipe(folder, changes))
    if made := tuple(change for change in changes if not _is_harmless_change(change)):
        _refuse_changes(folder, made)
    name = adapter or recipe.adapters[0].name
    if not (folder / "adapters" / name).is_dir():
        known = ", ".join(adapter.name for adapter in recipe.adapters)
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}; the recipe has {known}. Train it: "
            f"{command_line('train', folder)}"
        )
    texts = JobTexts(recipe)
    directory = Directory.read(folder)
    plan = make_plan(recipe, texts, directory.digests)
    stale = find_stale(upstream(plan, f"train/{name}"), directory, whatever_inputs=True)
    if stale:
        raise _lacking(
            f"adapter {name!r}",
            [s for s in plan if s.name in stale],
            stale,
            folder,
            lambda verb: command_line(verb, folder),
        )
    context = new_context(recipe, texts, folder, track)
    from qwlora.adapter.adapter_folder import check_adapter

    check_adapter(folder / "adapters" / name, context.base_fingerprint)
    return context, name


def add_task_scores(
    folder: Path, scores: Mapping[str, tuple[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Add scores of tasks to the results of a job, and rewrite results.json and report.html.

    Args:
        scores: by model, such as `adapted/NAME`: the stage that made it, and scores by task.

    Returns:
        The content of results.json.

    Raises:
        DirectoryError: the folder is not a job directory, is in use, or cannot be written.
    """
    recipe = resolve_compute(job_recipe(folder))
    with Directory.open(folder, recipe) as directory:
        plan = make_plan(recipe, JobTexts(recipe), directory.digests)
        stale = find_stale(plan, directory)
        keys = {name: record.key for name, record in directory.records.items()}
        with as_directory_errors(folder):
            keep_scores(directory.private, scores, keys)
        earlier = _earlier_results(folder)
        kept: dict[str, Any] = {key: earlier[key] for key in ("run", "error") if key in earlier}
        return _write_results(directory, recipe, plan, stale, kept)


def job_recipe(folder: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """The recipe of an existing job.

    Raises:
        DirectoryError: the folder is not a job directory.
        RecipeError: the recipe or a change is not valid.
    """
    from qwlora.recipe import load_recipe

    if not (folder / "recipe.yaml").is_file():
        raise DirectoryError(
            f"{str(folder)!r} is not a job directory: it has no recipe.yaml; `qwlora run` "
            "creates one"
        )
    return load_recipe(folder / "recipe.yaml", changes)


def check_current(context: Any, stage: str) -> None:
    """Check that a stage of the context's job, and all that it needs, is current.

    Raises:
        DirectoryError: it is not, or the recipe no longer has this stage.
    """
    _check_current(context.path, context.recipe, context.texts, stage)


def check_stages(folder: Path, stages: Iterable[str]) -> None:
    """Check that a job can be written, and that its stages are current.

    Raises:
        DirectoryError: it cannot, or one is not.
    """
    recipe = resolve_compute(job_recipe(folder))
    texts = JobTexts(recipe)
    Directory.read(folder).check_writable()
    for stage in stages:
        _check_current(folder, recipe, texts, stage)


def _check_current(path: Path, recipe: Recipe, texts: JobTexts, stage: str) -> None:
    directory = Directory.read(path)
    plan = make_plan(recipe, texts, directory.digests)
    needed = upstream(plan, stage)
    if not needed:
        raise DirectoryError(
            f"{str(path)!r} holds {stage}, but its recipe no longer does; add it to the "
            "recipe and run the job again"
        )
    if stale := find_stale(needed, directory):
        raise _lacking(
            stage,
            [s for s in needed if s.name in stale],
            stale,
            path,
            lambda verb: command_line(verb, path),
        )


def command_line(verb: str, folder: Path) -> str:
    """The command that runs `verb` on the job in `folder`."""
    return shlex.join(["qwlora", verb, "--out", str(folder)])


def is_calibrated(context: Any, name: str) -> bool:
    """Whether adapter `name` is calibrated in the context's job.

    Raises:
        CalibrationError: the calibration is of another recipe, adapter or base.
    """
    if not (context.path / "simulation" / name).is_dir():
        return False
    directory, stage = Directory.read(context.path), f"calibrate/{name}"
    plan = make_plan(context.recipe, context.texts, directory.digests)
    if stage not in {s.name for s in plan}:
        known = ", ".join(adapter.name for adapter in context.recipe.adapters)
        raise CalibrationError(
            f"adapter {name!r} in {str(context.path)!r} is from an earlier version of the recipe, "
            f"which now has {known}; choose one of these"
        )
    if reason := find_stale(upstream(plan, stage), directory).get(stage):
        raise CalibrationError(
            f"the calibration of adapter {name!r} in {str(context.path)!r} is out of date: it "
            f"is of another recipe, adapter or base ({reason}). Calibrate again: "
            f"{command_line('calibrate', context.path)}"
        )
    return True


def _is_harmless_change(change: str) -> bool:
    """Whether a change can be applied to an existing job without redoing its base or adapters."""
    key = change.partition("=")[0]
    return key.split(".")[0] == "simulation" or key in _COUNTS


def _refuse_changes(folder: Path, changes: tuple[str, ...]) -> None:
    from qwlora.recipe import load_recipe

    path = folder / "recipe.yaml"
    before, after = (
        {stage.name: stage.key for stage in _plan_of(load_recipe(path, given))}
        for given in ((), changes)
    )
    again = [
        name
        for name, key in after.items()
        if name.partition("/")[0] in ("quantize", "calibrate-base", "train")
        and before.get(name) != key
    ]
    asked = shlex.join(_as_options(changes))
    if not again:
        raise RecipeError(str(path), [f"{asked}: has no effect on this command; remove it"])
    raise RecipeError(
        str(path),
        [
            f"{asked}: needs {', '.join(again)} to run again, but this command can only change "
            f"{', '.join(('simulation.*', *_COUNTS))}. Run the job with the change first: "
            + shlex.join(["qwlora", "run", str(path), "--out", str(folder), *_as_options(changes)])
        ],
    )


def _as_options(changes: Iterable[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def _plan_of(recipe: Recipe) -> list[Stage]:
    recipe = resolve_compute(recipe)
    return make_plan(recipe, JobTexts(recipe))


def _check_needs(
    plan: list[Stage],
    waiting: list[Stage],
    verbs: Collection[str],
    directory: Directory,
    stale: Mapping[str, str],
    command: Callable[[str], str],
) -> None:
    """Raise an error if a stage needs others that are neither current nor requested.

    The error names all commands that must run first.
    """
    by_name, lacking = {s.name: s for s in plan}, set[str]()

    def find_lacking(stage: Stage) -> None:
        for need in (by_name[name] for name in stage.needs):
            if need.name in stale and need.verb not in verbs and need.name not in lacking:
                lacking.add(need.name)
                find_lacking(need)

    for stage in waiting:
        find_lacking(stage)
    if lacking:
        asking = dict.fromkeys(s.verb for s in waiting)
        needed = [s for s in plan if s.name in lacking]
        raise _lacking(" and ".join(asking), needed, stale, directory.path, command)


def _lacking(
    what: str,
    needed: Sequence[Stage],
    stale: Mapping[str, str],
    folder: Path,
    command: Callable[[str], str],
) -> DirectoryError:
    first = {stage.verb for stage in needed}
    return DirectoryError(
        f"{what} needs {', '.join(s.name for s in needed)}, missing or out of date in "
        f"{str(folder)!r}:\n"
        + "".join(f"  {stage.name}: {stale[stage.name]}\n" for stage in needed)
        + f"Run first: {' && '.join(command(verb) for verb in VERBS if verb in first)}"
    )


def _write_results(
    directory: Directory,
    recipe: Recipe,
    plan: list[Stage],
    stale: Collection[str],
    keys: dict[str, Any],
) -> dict[str, Any]:
    """Write results.json, report.html and the model cards; `keys` are added to the results."""
    results = collect_results(directory, recipe, plan, stale)
    merge_results(results, keys)
    with as_directory_errors(directory.path):
        write_text(directory.path / "results.json", strict_json.dumps(results, indent=1) + "\n")
    write_report(directory.path, results, recipe)
    write_cards(directory, recipe, results)
    return results


def _earlier_results(out: Path) -> dict[str, Any]:
    """The results of an earlier run; empty if there are none, or they are damaged."""
    try:
        found = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def quiet_libraries() -> None:
    """Silence progress bars, notices and deprecation warnings of other libraries."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=SlowComputeWarning)  # preflight reports it
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
