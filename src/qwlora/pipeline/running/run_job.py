"""Run the stages of a recipe in order, skipping those that are current.

`results.json` and `report.html` are rewritten when a stage begins and ends, and while an adapter is
trained (`job_status.py`). They list only current results.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from qwlora.data.prepared_data import summary
from qwlora.errors import DirectoryError, described
from qwlora.formats.model_card import text_of
from qwlora.pipeline import VERBS
from qwlora.pipeline.job import journal
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.output_path import as_directory_errors, check_outside_data
from qwlora.pipeline.job.stage_records import Record, Stage, record_path
from qwlora.pipeline.plan.plan import JobTexts, make_plan, resolve_compute
from qwlora.pipeline.plan.stale_stages import check_kept, check_needs, dependents, find_stale
from qwlora.pipeline.results.results import (
    TIMING,
    collect_results,
    last_status,
    merge_results,
    write_results,
)
from qwlora.pipeline.results.results_table import base_costs
from qwlora.pipeline.running.job_status import JobStatus
from qwlora.pipeline.stages import new_context
from qwlora.recipe import Recipe, load_recipe
from qwlora.system.atomic import total_bytes
from qwlora.system.machine import peak_rss_bytes, reset_peak_rss, return_freed_memory
from qwlora.system.processes import end, is_first_process, joined_stages, joint_stage
from qwlora.system.progress import Track, untracked

Say = Callable[[str], None]
Watch = Callable[[str, int, int], None]


def run_file(
    path: Path, out: Path, changes: tuple[str, ...] = (), **options: Any
) -> dict[str, Any]:
    """`run` with the recipe in the file `path`, which may be the job's own, and `changes` to it."""
    journal.finish(out)  # before the recipe in the job's directory is read
    before = text_of(out / "recipe.yaml")
    return run(load_recipe(path, changes), out, recipe_text=before, **options)


def run(
    recipe: Recipe,
    out: Path,
    verbs: Collection[str] = VERBS,
    track: Track = untracked,
    say: Say = lambda line: None,
    command: Callable[[str], str] | None = None,
    replace: bool = False,
    watch: Watch | None = None,
    recipe_text: str | None = None,
) -> dict[str, Any]:
    """Run the stages of `recipe` whose verb is in `verbs` in the directory `out`.

    Current stages are skipped (see `stale_stages.py`), but `verify` always runs when only some
    verbs are requested.

    Args:
        say: receives one line for each stage that is skipped or run.
        command: returns the command line that runs a verb of this job, for messages.
        replace: replace adapters that were trained with other settings.
        watch: called when a stage begins, with its name, its number and how many will run. Without
            it, memory and disk are not estimated before.
        recipe_text: see `Directory.open`.

    Returns:
        The content of `results.json`. An error of a stage leaves the stages before it finished.
    """
    check_outside_data(out, recipe)
    recipe = resolve_compute(recipe)
    texts = JobTexts(recipe, track)
    digests = Digests(out / ".qwlora" / "digests.json", track)
    plan = make_plan(recipe, texts, digests)
    if not is_first_process():
        return _join_stages(new_context(recipe, texts, out, untracked), plan)
    job = _Run(recipe, out, texts, plan, track, say)
    try:
        peek = Directory.read(out, recipe, digests)
        asked = job.check(peek, verbs, command, replace)
        if waiting := job.waiting(asked):
            job.prepare(waiting, estimates=watch is not None)
        elif not peek.is_writable:
            for stage in asked:
                job.say_skipped(stage)
            results = collect_results(peek, recipe, plan, job.stale)
            merge_results(results, last_status(out))
            return results
        with Directory.open(out, recipe, recipe_text, digests) as directory:
            job.stale = find_stale(plan, directory)
            directory.drop(*(n for n in job.unplanned(directory) if directory.problem(n, None)))
            return job.run(directory, asked, watch or (lambda stage, number, count: None))
    finally:
        digests.save()
        end()


class _Run:
    """One run, in the first process."""

    def __init__(
        self, recipe: Recipe, out: Path, texts: JobTexts, plan: list[Stage], track: Track, say: Say
    ):
        self.recipe, self.out, self.texts, self.plan = recipe, out, texts, plan
        self.track, self.say = track, say
        self.stale: dict[str, str] = {}  # why each stage that is not current has to run
        self.always: set[str] = set()  # stages that run even if they are current
        self.context: Any = None  # until a stage, or a check before all stages, needs it

    def check(
        self,
        directory: Directory,
        verbs: Collection[str],
        command: Callable[[str], str] | None,
        replace: bool,
    ) -> list[Stage]:
        """All checks of the directory; returns the stages of `verbs`."""
        asked = [stage for stage in self.plan if stage.verb in verbs]
        if not asked:
            self.say(f"{' and '.join(verbs)}: nothing to do, no target or setting needs it")
        if not set(VERBS) <= set(verbs):
            self.always = {stage.name for stage in asked if stage.verb == "verify"}
        self.stale = find_stale(self.plan, directory)
        if "calibrate" not in verbs:  # simulations that were never calibrated are not evaluated
            for stage in [s for s in asked if s.name.startswith("evaluate/simulated/")]:
                if stage.needs[0] not in directory.records:
                    self.say(f"{stage.name}: left out, {stage.needs[0]} has not run")
                    asked.remove(stage)
        waiting = self.waiting(asked)
        check_needs(self.plan, waiting, verbs, self.out, self.stale, command)
        check_kept(waiting, directory, self.recipe, self.stale, replace)
        if waiting and not directory.is_writable:
            first = waiting[0].name
            raise DirectoryError(
                f"{str(self.out)!r} is not writable, but {first} must run "
                f"({self.stale.get(first, 'as requested')}); make the directory writable, or "
                "copy it"
            )
        for name in directory.damaged:
            self.say(f"{self.out / record_path(name)} is damaged; {name} runs again")
        for stage in waiting:
            if stage.artifact is not None:
                directory.check_replaceable(stage.name, stage.artifact)
        return asked

    def waiting(self, asked: list[Stage]) -> list[Stage]:
        return [s for s in asked if s.name in self.stale or s.name in self.always]

    def unplanned(self, directory: Directory, after: Stage | None = None) -> list[str]:
        """Names of records that are not of the plan, such as those of a target that the recipe no
        longer has. They are current again when it comes back.

        Args:
            after: only those that may have read what this stage writes. Those of other adapters
                have not.
        """
        names = [*(directory.records.keys() - {stage.name for stage in self.plan})]
        if after is None or after.verb in ("export", "verify", "evaluate"):
            return names if after is None else []
        others = {a.name for a in self.recipe.adapters if after.adapter not in (None, a.name)}
        parts = {name: set(name.split("/")) for name in names}
        return [n for n in names if not parts[n] & others or after.adapter in parts[n]]

    def say_skipped(self, stage: Stage) -> None:
        self.say(f"{stage.name}: skipped, nothing it depends on has changed")

    def prepare(self, waiting: list[Stage], estimates: bool) -> None:
        """All checks of text and model, which need no writing, and an estimate."""
        self.context = new_context(self.recipe, self.texts, self.out, self.track)
        from qwlora.pipeline.running import forecast, preflight

        preflight.preflight(self.context, {stage.verb for stage in waiting}, self.say)
        for name, text in (prepared := self.context.all_texts()).items():
            self.say(summary(text.describe(), name if len(prepared) > 1 else None))
        if not estimates:
            return
        holds_float = self.context.holds_float_model
        try:
            found = forecast.estimate(self.recipe, waiting, self.out, self.track, holds_float)
        except Exception as error:  # an estimate is no reason to stop a job
            self.say(f"no estimate of memory: {described(error)}")
        else:
            for line in (found.summary, *(f"warning: {line}" for line in found.problems)):
                self.say(line)

    def run(self, directory: Directory, asked: list[Stage], watch: Watch) -> dict[str, Any]:
        """Run the stages `asked`, as far as they are not current."""
        name = self.out.absolute().name
        status = JobStatus(
            lambda keys: write_results(directory, self.recipe, self.plan, self.stale, keys),
            self.plan,
            f"qwlora run {name}/recipe.yaml --out {name}",
            last_status(self.out),
        )
        waiting = [stage.name for stage in self.waiting(asked)]
        for stage in asked:
            if not self.waiting([stage]):
                directory.drop_work(stage.name, stage.key)  # of a run killed at its end
                self.say_skipped(stage)
                continue
            if stage.name in waiting:
                watch(stage.name, 1 + waiting.index(stage.name), len(waiting))
            with status.failures():
                record = self._run_stage(directory, stage, status)
            self.say(f"{stage.name}: done in {record.seconds:.1f} s")
            for what, cost in base_costs(record.results):  # before its adapter is trained
                self.say(f"{what}: {cost}")
        return status.end(self.stale)

    def _run_stage(self, directory: Directory, stage: Stage, status: JobStatus) -> Record:
        """Run one stage, and mark those that read what it wrote."""
        name, reason = stage.name, self.stale.get(stage.name, "has not run")
        self.say(f"{name} ...{'' if reason.startswith('has not run') else f' ({reason})'}")
        follows = dependents(self.plan, name)
        if name not in self.stale or stage.verb == "verify":
            directory.drop(name, *follows)  # an earlier success must not outlast a failure
            self.stale.setdefault(name, "is running")
        status.begin(name)
        if self.context is None:
            self.context = new_context(self.recipe, self.texts, self.out, self.track)
        self.context.on_training = status.train
        from qwlora.pipeline.stages.stage_functions import RUN

        began, started = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
        gc.collect()
        return_freed_memory()  # of the stages before
        reset_peak_rss()
        with as_directory_errors(directory.path), directory.scratch() as scratch:
            work, is_joint = directory.work(name, stage.key), stage.verb not in ("export", "verify")
            with (
                joint_stage(name, is_joint),
                self.context.stage(name, stage.verb) as device_memory,
            ):
                results = RUN[stage.verb](self.context, stage, scratch, work)
            seconds = time.perf_counter() - began
            memory = {"peak_rss_bytes": peak_rss_bytes(), **device_memory}
            results[TIMING] = {"started": started, **memory}
            if stage.artifact is not None:
                results[TIMING]["bytes"] = total_bytes(scratch.rglob("*"))
            record = Record(stage.key, seconds, results)
            readers = [*follows, *self.unplanned(directory, stage)]
            directory.commit(name, record, scratch, stage.artifact, readers)
            directory.drop_work(name)
        for other in follows:
            if not self.stale.get(other, "").startswith("has not run"):
                self.stale[other] = f"reads {name}, which ran again"
        del self.stale[name]
        return record


def _join_stages(context: Any, plan: list[Stage]) -> dict[str, Any]:
    """Join the stages that all processes run together; returns no results."""
    from qwlora.pipeline.stages.stage_functions import RUN

    by_name = {stage.name: stage for stage in plan}
    for name in joined_stages():
        stage = by_name[name]
        work = Directory(context.path).work(name, stage.key)
        with (
            TemporaryDirectory() as unused,
            context.stage(name, stage.verb),
            warnings.catch_warnings(action="ignore"),  # the first process gives them
        ):
            RUN[stage.verb](context, stage, Path(unused), work)
    return {}
