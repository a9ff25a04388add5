"""Run the stages of a recipe in order, skipping those that are current."""

from __future__ import annotations

import contextlib
import gc
import time
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from importlib.metadata import version
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

from qwlora.data.prepared_data import caution_lines, summary
from qwlora.errors import DirectoryError, VerificationError, described, duration
from qwlora.formats.model_card import text_of
from qwlora.pipeline import VERBS
from qwlora.pipeline.job import (
    Judge,
    check_kept,
    check_needs,
    command_line,
    differences,
    job_recipe,
    needs_settling,
    settle,
    sources_of,
    write_bundle_readmes,
)
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.results import TIMING, JobStatus, last_status, now, write_results
from qwlora.pipeline.sources import Sources, unread
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stages import new_context, run_stage
from qwlora.pipeline.store import TEXT_NAME, Record, Store
from qwlora.recipe import Recipe, load_recipe
from qwlora.recipe.implied import check_outside_data
from qwlora.recipe.recipe_text import edited, written
from qwlora.report.summary_table import base_costs
from qwlora.system.atomic import total_bytes, write_text
from qwlora.system.machine import peak_rss_bytes, reset_peak_rss, return_freed_memory
from qwlora.system.output_path import as_directory_errors, check_output
from qwlora.system.processes import connected, is_first_process, joined_stages, joint_stage
from qwlora.system.progress import Track, untracked

KNOWN_AFTER = 60.0  # seconds of training, after which its pace tells how long it takes
Say = Callable[[str], None]
Progress = Callable[[], dict[str, Any]]
Watch = Callable[[str, int, int], None]
ShowTraining = Callable[[Progress], None]


@connected()
def run(
    recipe: Path | Recipe,
    out: Path,
    verbs: Collection[str] = VERBS,
    track: Track = untracked,
    *,
    changes: tuple[str, ...] = (),
    device: str | None = None,
    replace: Collection[str] = (),
    say: Say = lambda line: None,
    watch: Watch | None = None,
    show_training: ShowTraining = lambda progress: None,
) -> dict[str, Any]:
    """Run the stages of a recipe whose verb is in `verbs` in the directory `out`.

    Current stages are skipped, but `verify` always runs when only some verbs are requested.

    Args:
        recipe: a recipe, or its file, which may be the job's own.
        changes: changes to the recipe, which the job keeps; see `load_recipe`.
        replace: adapters that may be trained again with other settings.
        say: receives one line for each stage that is skipped or run.
        watch: called when a stage begins, with its name, its number and how many will run. Without
            it, memory and disk are not estimated before.
        show_training: receives, after each step of training, a function that gives its losses, its
            number and its speed.

    Returns:
        The content of `results.json`. An error of a stage leaves the stages before it finished.

    Raises:
        VerificationError: at the end, if a check failed.
    """
    # This comes first, so that a wrong --out is not reported as a missing recipe.
    check_output(out)
    job_file = out / "recipe.yaml"
    before, file, is_own = _recipe_in(out), None, False
    if isinstance(recipe, Path):
        file = recipe / "recipe.yaml" if recipe.is_dir() else recipe
        is_own = file.exists() and job_file.exists() and job_file.samefile(file)
        wanted = job_recipe(out, changes) if is_own else load_recipe(recipe, changes)
    else:
        wanted = recipe
    check_outside_data(out, wanted)
    computed = wanted if device is None else wanted.model_copy(update={"device": device})
    if not is_first_process():
        return _join_stages(computed, out)
    # Messages suggest a command. It names the job alone if the job's recipe asks for the same.
    is_kept = isinstance(recipe, Recipe) or before == wanted
    asked = [str(out)] if is_own or is_kept else [str(recipe), "--out", str(out)]
    asked += [] if is_kept else [part for change in changes for part in ("--set", change)]
    asked += [] if device is None else ["--device", device]
    store = Store(out)
    if before is None:
        store.check_unclaimed()
    elif not is_own:
        _check_same_job(before, wanted, out)
    try:
        with contextlib.ExitStack() as lock:
            # A job that is only read, from a read-only disk, needs no lock.
            if store.is_writable:
                lock.enter_context(store.locked())
                if _recipe_in(out) != before:
                    raise DirectoryError(f"the recipe of {str(out)!r} changed meanwhile; run again")
            sources = sources_of(wanted, store, track, reads=True)
            job = _Run(
                wanted, computed, before, file, store, sources, track, say, show_training, asked
            )
            try:
                return job.run(verbs, replace, watch)
            finally:
                # A first run that made nothing leaves no job, so the next recipe may be another.
                if before is None and not store.has_work:
                    for name in ("recipe.yaml", "results.json", "report.html"):
                        (out / name).unlink(missing_ok=True)
    finally:
        store.seen.save()


def _recipe_in(out: Path) -> Recipe | None:
    is_job = (out / ".qwlora").is_dir() and (out / "recipe.yaml").is_file()
    return job_recipe(out) if is_job else None


def _check_same_job(before: Recipe, wanted: Recipe, out: Path) -> None:
    if before.name != wanted.name:
        raise DirectoryError(
            f"{str(out)!r} belongs to recipe {before.name!r}, not {wanted.name!r}. "
            "Choose another --out, or delete the directory"
        )
    names = [adapter.name for adapter in wanted.adapters]
    if lost := [a.name for a in before.adapters if a.name not in names]:
        known = {adapter.name for adapter in before.adapters}
        new = [name for name in names if name not in known and wanted.data_of(name).source]
        remedy = f"Run `{command_line('run', out)}`, "
        if new and wanted.model == before.model:
            more = ("--name", new[0], "--data", wanted.data_of(new[0]).source)
            add = command_line("adapters", "add", out, *more)
            remedy = f"To train {new[0]} as well: `{add}`. Otherwise run another --out, "
        raise DirectoryError(
            f"{str(out)!r} has adapters {', '.join(lost)}, which this recipe lacks. {remedy}"
            "add them to the recipe, or remove them: "
            f"qwlora adapters remove {out} {lost[0]}"
        )


@dataclass
class _Run:
    recipe: Recipe
    computed: Recipe  # the same, on the device of this run
    before: Recipe | None
    file: Path | None  # of the recipe
    store: Store
    sources: Sources
    track: Track
    say: Say
    show_training: ShowTraining
    asked: Sequence[str]

    def __post_init__(self) -> None:
        self.judge = Judge(make_plan(self.recipe, self.sources), self.store)
        if needs_settling(self.judge) and self.store.is_writable:
            settle(self.store, self.recipe, self.track)
            self.judge.again()
        self.always: set[str] = set()  # stages that run even if they are current
        # Making it imports torch, which takes seconds. A run in which nothing changed has none.
        self.context: Any = None
        self.failures: list[tuple[str, VerificationError]] = []
        self.is_time_known, self.training_began, self.trained = False, 0.0, ""

    def run(
        self, verbs: Collection[str], replace: Collection[str], watch: Watch | None
    ) -> dict[str, Any]:
        asked = self._check(verbs, replace)
        if waiting := self._waiting(asked):
            self._prepare(waiting, has_estimate=watch is not None)
        self._write_recipe()
        status = JobStatus(
            lambda keys: write_results(self.judge, self.recipe, keys),
            self.judge.plan,
            command_line("run", Path(self.store.path.absolute().name)),
            last_status(self.store.path),
        )
        names = [stage.name for stage in waiting]
        for stage in asked:
            if not self._waiting([stage]):
                self.say(f"{stage.name}: skipped, up to date")
                # A kill right after the artifact was put in place leaves this folder.
                rmtree(self.store.work(self.store.records[stage.place].key), ignore_errors=True)
                continue
            if self._is_proven(stage):
                continue
            if stage.name in names and watch is not None:
                watch(stage.name, 1 + names.index(stage.name), len(names))
            with status.failures():
                # Asked again: only now is it known whether a base that ran again is another one.
                check_kept(self.judge, [stage.name], replace)
                record = self._run_stage(stage, status)
            self.say(f"{stage.name}: done in {record.seconds:.1f} s")
            # Shown at once: training an adapter on a base that lost too much may take hours.
            for figure, cost in base_costs(record.results):
                self.say(f"{figure}: {cost}".replace(TEXT_NAME, stage.text or ""))
        if not self.failures:
            return status.end("incomplete" if self.judge.stale else "finished")
        name, failure = self.failures[0]
        if len(self.failures) > 1:
            messages = [str(error) for _, error in self.failures]
            failure = VerificationError(f"{len(messages)} checks failed", messages)
        failure.results = status.end("failed", failure, name)
        raise failure

    def _check(self, verbs: Collection[str], replace: Collection[str]) -> list[Stage]:
        """All checks of the directory. Returns the stages of `verbs`."""
        judge, store = self.judge, self.store
        asked = [stage for stage in judge.plan if stage.verb in verbs]
        if not asked:
            self.say(f"{' and '.join(verbs)}: nothing to do for these targets and settings")
        if not set(VERBS) <= set(verbs):
            self.always = {stage.name for stage in asked if stage.verb == "verify"}
        # `qwlora evaluate` also works before the first calibration: it leaves simulations out.
        if "calibrate" not in verbs:
            for stage in [s for s in asked if s.kind == "evaluate/simulated"]:
                needed = f"calibrate/{stage.adapter}"
                if (reason := judge.stale.get(needed)) == "has not run":
                    self.say(f"{stage.name}: left out, {needed} {reason}")
                    asked.remove(stage)
        # A finished stage does not need a file that is gone, but its path may be mistyped.
        errors = [gone.error for stage in asked for gone in unread(stage.inputs) if gone.error]
        for problem in dict.fromkeys(map(str, errors)):
            self.say(f"{problem}. Earlier results are kept")
        names = [adapter.name for adapter in self.recipe.adapters]
        if unknown := [name for name in replace if name not in names]:
            raise DirectoryError(f"--replace {unknown[0]}: the recipe has {', '.join(names)}")
        waiting = self._waiting(asked)
        check_needs(judge, waiting, verbs, self.asked)
        check_kept(judge, [stage.name for stage in waiting], replace)
        if waiting and not store.is_writable:
            first = waiting[0].name
            raise DirectoryError(
                f"{str(store.path)!r} is not writable, but {first} must run "
                f"({judge.stale.get(first, 'as requested')}); make the directory writable, or copy "
                "it"
            )
        for stage in waiting:
            stage.check_read()
            if stage.artifact is not None:
                store.check_replaceable(stage.artifact)
        planned = {stage.place for stage in judge.plan}
        for place, record in store.records.items():
            if record.stage == "train" and place not in planned:
                name = place.partition("/")[2]
                self.say(
                    f"{place} belongs to no adapter of the recipe. It is kept. To delete it: "
                    f"qwlora adapters remove {store.path} {name}"
                )
        return asked

    def _waiting(self, asked: list[Stage]) -> list[Stage]:
        return [s for s in asked if s.name in self.judge.stale or s.name in self.always]

    def _is_proven(self, stage: Stage) -> bool:
        """Whether a check cannot run here, and these files have passed it where it could."""
        record = self.store.records.get(stage.place)
        if stage.verb != "verify" or record is None or record.not_run or record.failed:
            return False
        if (missing := stage.missing()) is None or record.needs != self.judge.versions(stage):
            return False
        self.say(f"{stage.name}: not run here ({missing}); its existing proof is kept")
        return True

    def _prepare(self, waiting: list[Stage], has_estimate: bool) -> None:
        self.context = new_context(self.computed, self.sources, self.store.path, self.track)
        from qwlora.pipeline import forecast, preflight

        preflight.preflight(self.context, {stage.verb for stage in waiting}, self.say)
        for name, text in (prepared := self.context.all_texts()).items():
            self.say(summary(text.describe(), name if len(prepared) > 1 else None))
        for line in caution_lines(prepared):
            self.say(line)
        names = [stage.name for stage in waiting]
        texts = {data: prepared.get(name) for name, data in self.recipe.texts().items()}
        for adapter in self.recipe.adapters:
            text = texts.get(self.recipe.data_of(adapter))
            if text is not None and adapter.steps and f"train/{adapter.name}" in names:
                self.say(f"{adapter.name}: {adapter.length(len(text.train))}")
        if not has_estimate:
            return
        try:
            estimates = forecast.estimate(self.recipe, waiting, self.judge)
        # A bug in an estimate is no reason to stop a job.
        except Exception as error:
            self.say(f"memory cannot be estimated: {described(error)}")
        else:
            self.is_time_known = estimates.seconds is not None
            for line in (estimates.summary, *(f"warning: {p}" for p in estimates.problems)):
                self.say(line)

    def _write_recipe(self) -> None:
        path = self.store.path / "recipe.yaml"
        if self.before == self.recipe or not self.store.is_writable:
            return
        if self.before is None:
            text = written(self.recipe, self.file, path)
        else:
            text = edited(text_of(path), self.before, self.recipe, path)
            old, new = (recipe.model_dump(mode="json") for recipe in (self.before, self.recipe))
            for line in differences(old, new, {}):
                self.say(f"{path}: {line}")
        with as_directory_errors(self.store.path):
            write_text(path, text)

    def _run_stage(self, stage: Stage, status: JobStatus) -> Record:
        name, store = stage.name, self.store
        reason = self.judge.stale.get(name, "as requested")
        self.say(f"{name} ...{'' if reason == 'has not run' else f' ({reason})'}")
        status.begin(name)
        if self.context is None:
            self.context = new_context(self.computed, self.sources, self.store.path, self.track)
        self.context.on_training = partial(self._trained, name, status)
        began, started = time.perf_counter(), now()
        stage.check_read()
        record = Record(stage.kind, dict(stage.inputs), self.judge.versions(stage))
        # Memory of the stages before must not count in this stage's peak.
        gc.collect()
        return_freed_memory()
        reset_peak_rss()
        with as_directory_errors(store.path), store.scratch(stage.place) as scratch:
            work, is_joint = store.work(record.key), stage.verb not in ("export", "verify")
            with (
                joint_stage((name, record.key), is_joint),
                self.context.stage(name, stage.verb) as device_memory,
            ):
                try:
                    results = run_stage(self.context, stage, scratch, work)
                except VerificationError as error:
                    if stage.verb != "verify":
                        raise
                    # No other stage needs a check, so the others run, and the error comes last.
                    self.failures.append((name, error))
                    results = error.results or {}
            memory = {"peak_rss_bytes": peak_rss_bytes(), **device_memory}
            results[TIMING] = {"started": started, **memory}
            if stage.artifact is not None:
                results[TIMING]["bytes"] = total_bytes(scratch.rglob("*"))
            record = changed(
                record,
                results=results,
                seconds=time.perf_counter() - began,
                made_by=f"qwlora {version('qwlora')}",
                not_run=stage.missing() or "",
                failed=any(failed == name for failed, _ in self.failures),
            )
            record = store.commit(stage.place, record, scratch)
            if stage.verb in ("export", "verify"):
                write_bundle_readmes(store, [stage.kind.split("/")[1]])
            rmtree(work, ignore_errors=True)
        self.judge.again()
        return record

    def _trained(self, name: str, status: JobStatus, progress: Progress) -> None:
        status.train(progress)
        if self.trained != name:  # its first step
            self.trained = name
            if (step := progress()["step"]) > 1:
                self.say(f"{name}: resumed after step {step - 1}")
        self.show_training(progress)
        self.training_began = self.training_began or time.monotonic()
        if not self.is_time_known and time.monotonic() - self.training_began >= KNOWN_AFTER:
            self.is_time_known, so_far = True, progress()
            stale = [s for s in self.judge.plan if s.verb == "train" and s.name in self.judge.stale]
            later = 0
            for other in (s for s in stale if s.name != name):
                adapter = self.context.adapter(other.adapter)
                later += adapter.steps_on(len(self.context.text(adapter.name).train))
            left = so_far["step_seconds"] * (so_far["steps"] - so_far["step"] + later)
            self.say(
                f"{name}: step {so_far['step']} of {so_far['steps']}. Time left at this pace: "
                f"{duration(left)}"
            )


def _join_stages(recipe: Recipe, out: Path) -> dict[str, Any]:
    sources = Sources(recipe, is_new=False)
    stages = {stage.name: stage for stage in make_plan(recipe, sources)}
    context = new_context(recipe, sources, out, untracked)
    for name, key in joined_stages():
        stage, work = stages[name], Store(out).work(key)
        with (
            TemporaryDirectory() as unused,
            context.stage(name, stage.verb),
            # The first process gives the same warnings.
            warnings.catch_warnings(action="ignore"),
        ):
            run_stage(context, stage, Path(unused), work)
    return {}
