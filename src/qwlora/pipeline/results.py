"""The results of a job (docs/results.md), and the files that show them to people: results.json,
report.html and the model cards. Nothing reads these back: `read_job` collects the results from the
stage.json files, and what a run left in `.qwlora/status.json`.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError, QwloraError, QwloraWarning, SourceError, remedy_of
from qwlora.formats.model_source import locate
from qwlora.pipeline.job import Judge, OpenJob, command_line, upstream
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.store import CARD, NAME, TEXT_NAME
from qwlora.recipe import Recipe
from qwlora.recipe.yaml_core import dump_yaml
from qwlora.report.model_cards import card_text
from qwlora.report.page import render
from qwlora.report.results_view import REPORT, Job
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.machine import machine, peak_rss_bytes, versions
from qwlora.system.output_path import as_directory_errors
from qwlora.system.parameter_names import BASE
from qwlora.system.seen import sealed, unsealed

RESULTS_FORMAT = 1
STATUS = "status.json"
TIMING = "timing"  # of one stage, in its record; `stages` and `sizes` in results.json
# While training, status is written at most every 10 seconds, using less than 1 % of the time.
LEAST_SECONDS, COST = 10.0, 100


def collect_results(judge: Judge, recipe: Recipe) -> dict[str, Any]:
    """The results of all stages that are current, and of checks that failed."""
    results: dict[str, Any] = {"format": RESULTS_FORMAT, "recipe": recipe.name, "stages": {}}
    if recipe.model.trust_remote_code:
        results["trust_remote_code"] = True
    for stage in filter(judge.counts, judge.plan):
        record = judge.store.records[stage.place]
        names = {NAME: stage.adapter or stage.case, TEXT_NAME: stage.text}
        measured = _named(record.results, names)
        timing = measured.pop(TIMING, {})
        merge_results(results, _by_text(measured, stage, recipe))
        size = timing.pop("bytes", None)
        entry = results["stages"].setdefault(stage.verb, {"seconds": 0.0, "parts": {}})
        entry["seconds"] += record.seconds
        entry["parts"][stage.name] = {"seconds": record.seconds, **timing}
        if size is not None and stage.artifact is not None:
            results.setdefault("sizes", {})[stage.artifact] = size
    weights = sum(results.get("base", {}).get(k) or 0 for k in ("weights", "float_weights"))
    for files in results.get("export", {}).values() if weights else ():
        for name in {BASE} & files.keys() or files:  # the files that hold a base
            files[name]["bits_per_weight"] = 8 * files[name]["bytes"] / weights
    return results


def _named(results: Any, names: Mapping[str, str | None]) -> Any:
    if isinstance(results, dict):
        return {names.get(key) or key: _named(value, names) for key, value in results.items()}
    return copy.deepcopy(results)


def _by_text(results: dict[str, Any], stage: Stage, recipe: Recipe) -> dict[str, Any]:
    """A stage's results, also listed by text when adapters have different texts."""
    texts = recipe.texts()
    if len(texts) < 2:
        return results
    text = stage.text
    if not text:
        own_text = recipe.base_text() if stage.adapter is None else recipe.data_of(stage.adapter)
        text = next((name for name, data in texts.items() if data == own_text), "base")
    listed = {key: value for key, value in results.items() if key != "data"}
    if "data" in results:
        listed["texts"] = {text: results["data"]}
    if "train" in results:
        listed["train"] = {n: {**figures, "text": text} for n, figures in results["train"].items()}
    for key in ("perplexity", "perplexity_stderr", "perplexity_document_stderr", "answers"):
        kinds = results.get(key, {}).items()
        measured = {k: v for k, v in kinds if k in ("float", "base", "adapted")}
        if measured and text in texts:
            listed[key] = {**results[key], "on": {text: measured}}
    return listed


def merge_results(into: dict[str, Any], part: dict[str, Any]) -> None:
    """Add `part` to the results `into`, in place; numbers in both are those of `part`."""
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge_results(into[key], value)
        else:
            # A copy, so that later merges do not change the records.
            into[key] = copy.deepcopy(value)


def job_of(
    folder: Path,
    recipe: Recipe,
    results: Mapping[str, Any],
    stale: Mapping[tuple[str, str], str] | None = None,
) -> Job:
    """A job as its report and its model cards read it."""
    content = recipe.model_dump(mode="json")
    text, name = dump_yaml(content), folder.absolute().name
    return Job(results, content, text, name, stale or {}, recipe.is_simulated)


def write_results(judge: Judge, recipe: Recipe, status: dict[str, Any]) -> dict[str, Any]:
    """Write results.json, report.html and the model cards, if files can be written; returns the
    results. `status` has the keys that no stage recorded: `run` and `error`."""
    results, store, folder = collect_results(judge, recipe), judge.store, judge.store.path
    merge_results(results, status)
    if not store.is_writable:
        return results
    job, page, cards = job_of(folder, recipe, results), "", dict[str, str]()
    with _harmless_bugs(folder / REPORT):
        page = render(job)
    with _harmless_bugs(folder / "base" / CARD):
        if job.section("base"):
            cards["base"] = card_text(job, recipe, None)
        for name in (a.name for a in recipe.adapters if job.section("train", a.name)):
            cards[f"adapters/{name}"] = card_text(job, recipe, name)
    with as_directory_errors(folder):
        write_text(store.private / STATUS, sealed(status))
        write_text(folder / "results.json", strict_json.dumps(results, indent=1) + "\n")
        if page:
            write_text(folder / REPORT, page)
        with contextlib.suppress(SourceError):
            # Without the model, a new card would say less than the one that is there.
            locate(recipe.model.source)
            for artifact, text in cards.items():
                store.write_card(artifact, text)
    return results


@contextmanager
def _harmless_bugs(file: Path) -> Iterator[None]:
    try:
        yield
    # A bug in what only shows results is no reason to stop a job of hours.
    except Exception as error:
        warnings.warn(
            f"{str(file)!r} was not written ({type(error).__name__}: {error}). The job and "
            "results.json are not affected; report this as a bug",
            QwloraWarning,
            stacklevel=3,
        )


def last_status(folder: Path) -> dict[str, Any]:
    """The status that the last run wrote; empty if it is missing or damaged."""
    return unsealed(folder / ".qwlora" / STATUS) or {}


def read_job(folder: Path) -> Job:
    """A job as it is now: the results of the stages that are current."""
    job, status = OpenJob(folder), last_status(folder)
    judge, store = job.judge, job.store
    if not store.records and not status:
        raise DirectoryError(
            f"{str(folder)!r} has no results yet. Run the job first: "
            f"`{command_line('run', folder)}`"
        )
    results = collect_results(judge, job.recipe)
    merge_results(results, status)
    run = results.setdefault("run", {})
    is_outdated = bool(judge.changed) or any(s.place not in store.records for s in judge.plan)
    if run.setdefault("state", "finished") == "finished" and is_outdated:
        run["state"] = "incomplete"
    # A proof vouches for files: the page says where they, or what they were made of, changed since.
    changed = dict[tuple[str, str], str]()
    for stage in judge.plan:
        if stage.verb == "verify" and stage.place in store.records:
            _, target, *adapter = stage.name.split("/")
            finished = [s for s in upstream(judge.plan, stage.name) if s.place in store.records]
            reasons = filter(None, (store.problem(needed.place) for needed in finished))
            if (reason := next(reasons, None)) is not None:
                changed[target, adapter[0] if adapter else BASE] = reason
    return job_of(folder, job.recipe, results, changed)


def rebuild_reports(folders: Sequence[Path]) -> list[Path]:
    """Write the report of each job, and return the files."""
    # All are rendered before the first is written: a damaged job leaves the other pages alone.
    pages = {folder / REPORT: render(read_job(folder)) for folder in folders}
    for path, text in pages.items():
        with as_directory_errors(path.parent):
            write_text(path, text)
    return [*pages]


class JobStatus:
    """The state of one run. `write` writes all files with the given keys added; `before` is the
    status of the last run."""

    def __init__(
        self,
        write: Callable[[dict[str, Any]], dict[str, Any]],
        plan: Sequence[Stage],
        command: str,
        before: dict[str, Any],
    ):
        self._write, self._before = write, before
        self._run: dict[str, Any] = {"command": command, "plan": [stage.name for stage in plan]}
        self._extra: dict[str, Any] = {}  # other keys
        self._training: Callable[[], dict[str, Any]] | None = None
        self._began: float | None = None
        self._written, self._took = 0.0, 0.0

    def begin(self, stage: str) -> None:
        if self._began is None:
            self._began, self._run["started"] = time.monotonic(), now()
        self._run["stage"], self._training = stage, None
        self.write("running")

    def train(self, progress: Callable[[], dict[str, Any]]) -> None:
        """A training step ended, or training diverged. `progress` gives the key `run.training`."""
        self._training = progress
        if time.monotonic() - self._written > max(LEAST_SECONDS, COST * self._took):
            self.write("running")

    def end(self, state: str, error: Exception | None = None, stage: str = "") -> dict[str, Any]:
        """All stages ran; the check in `stage` may have failed. Returns the results."""
        self._run["stage"], self._training = "", None
        if error is not None:
            self._extra = {"error": described_error(error, stage)}
        return self.write(state)

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Record an error or an interruption of the running stage before it is raised."""
        try:
            yield
        except (KeyboardInterrupt, Exception) as error:
            if isinstance(error, Exception):
                self._extra = {"error": described_error(error, self._run["stage"])}
            # The first error is the one to report.
            with contextlib.suppress(Exception):
                self.write("failed" if self._extra else "interrupted")
            raise

    def write(self, state: str) -> dict[str, Any]:
        began = time.monotonic()
        results = self._write(self._keys(state))
        self._written = time.monotonic()
        self._took = self._written - began
        return results

    def _keys(self, state: str) -> dict[str, Any]:
        if self._began is None:
            # No stage ran, so times, machine and versions of the last run are still those of the
            # results.
            if state != "finished" and "run" in self._before:
                return self._before
            kept = {k: v for k, v in self._before.get("run", {}).items() if k != "training"}
            return {"run": {**kept, "state": state, "stage": ""}}
        run = {
            **self._run,
            "state": state,
            "updated": now(),
            "elapsed_seconds": time.monotonic() - self._began,
            "peak_rss_bytes": peak_rss_bytes(),
            "versions": versions(),
            "machine": machine(),
        }
        if state != "running":
            run["finished"] = now()
        if self._training is not None:
            run["training"] = self._training()
        return {**self._extra, "run": run}


def described_error(error: BaseException, stage: str) -> dict[str, Any]:
    """The key `error` of results.json."""
    message = str(error) or type(error).__name__
    # results.json is shown to others: the working and home folders stay private.
    for folder, short in ((str(Path.cwd()), "."), (str(Path.home()), "~")):
        if len(folder) > 1:
            message = message.replace(folder, short)
    again = "Then run the same command. Finished stages are not repeated."
    described: dict[str, Any] = {"class": type(error).__name__, "message": message, "stage": stage}
    described["remedy"] = [remedy_of(error), again]
    if isinstance(error, QwloraError):
        # The page has the classes of `errors.py`, so a subclass gets the section of its base class.
        documented = next(c for c in type(error).__mro__ if c.__module__ == QwloraError.__module__)
        described["docs"] = f"docs/errors.md#{documented.__name__.lower()}"
    return described


def now() -> str:
    """The time, in seconds and UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
