"""Run a recipe: skip what is current, do the rest in order, keep `results.json` true after every stage."""

from __future__ import annotations

import copy
import json
import logging
import os
import shlex
import time
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

from qwlora.compute_precision import SlowComputeWarning
from qwlora.data import load_documents
from qwlora.data.prepared_data import describe, summary
from qwlora.errors import CalibrationError, DirectoryError, RecipeError
from qwlora.pipeline.directory import RESULTS_FORMAT, Directory, Record, explained, write_text
from qwlora.pipeline.distributed import done, follow, is_first_process, tell
from qwlora.pipeline.output_path import check_outside_data
from qwlora.pipeline.plan import VERBS, Stage, dependents, make_plan, resolve_compute
from qwlora.progress import Track, untracked
from qwlora.recipe import Recipe

Say = Callable[[str], None]

_COUNTS = ("data.evaluation_sequences", "data.calibration_sequences")


def run(
    recipe: Recipe,
    out: Path,
    verbs: Collection[str] = VERBS,
    track: Track = untracked,
    say: Say = lambda line: None,
    command: Callable[[str], str] | None = None,
) -> dict[str, Any]:
    """Run the stages of `recipe` whose verb is in `verbs`, over the directory `out`.

    Args:
        say: told, in a line each, what is skipped and what is done.
        command: the command line for a verb of this job, for messages.

    Returns:
        The content of `results.json`.

    Raises:
        SourceError, GridError: something is wrong with model or text; nothing was written.
        DirectoryError: `out` cannot be used, or a stage that is needed first is not current.
        QwloraError: a stage's own errors; what was finished before it stays.
    """
    check_outside_data(out, recipe.data.source)
    recipe = resolve_compute(recipe)
    documents = load_documents(
        recipe.data.source, recipe.data.held_out, recipe.seed, recipe.data.reading()
    )
    plan = make_plan(recipe, documents)
    if not is_first_process():
        return follow(new_session(recipe, documents, out, untracked), plan)
    try:
        return _run(
            recipe,
            out,
            verbs,
            documents,
            plan,
            track,
            say,
            command or (lambda verb: command_line(verb, out)),
        )
    finally:
        tell(None)


def _run(
    recipe: Recipe,
    out: Path,
    verbs: Collection[str],
    documents: Any,
    plan: list[Stage],
    track: Track,
    say: Say,
    command: Callable[[str], str],
) -> dict[str, Any]:
    peek = Directory.peek(out, recipe)
    waiting = [s for s in plan if s.verb in verbs and not peek.is_current(s.name, s.key)]
    behind = {name for stage in waiting for name in dependents(plan, stage.name)}
    waiting = [s for s in plan if s.verb in verbs and (s in waiting or s.name in behind)]
    _check_needs(plan, waiting, verbs, peek, command)
    for stage in waiting:
        if stage.artifact is not None:
            peek.check_replaceable(stage.artifact)
    session: Any = None
    if waiting:
        session = _start_session(recipe, documents, out, track, say, {s.verb for s in waiting})
        say(summary(describe(documents, session.data)))
    with Directory.open(out, recipe) as directory:
        directory.forget(keep={s.name for s in plan})
        for stage in (s for s in plan if s.verb in verbs):
            if directory.is_current(stage.name, stage.key):
                say(f"{stage.name}: skipped, nothing that it depends on has changed")
                continue
            session = session or new_session(recipe, documents, out, track)
            say(f"{stage.name} ...")
            seconds = _do(directory, session, stage, dependents(plan, stage.name))
            say(f"{stage.name}: done in {seconds:.1f} s")
            _write_results(directory, recipe, plan)
        return _write_results(directory, recipe, plan)


def _do(directory: Directory, session: Any, stage: Stage, follows: Collection[str]) -> float:
    from qwlora.pipeline.stages import STAGES

    began = time.perf_counter()
    with explained(directory.path), directory.scratch() as scratch:
        if stage.verb == "train":
            tell(stage.name)
        results = STAGES[stage.verb](
            session, stage, scratch, directory.work(stage.name, stage.work_key)
        )
        done()
        seconds = time.perf_counter() - began
        directory.commit(
            stage.name, Record(stage.key, seconds, results), scratch, stage.artifact, follows
        )
        directory.drop_work(stage.name)
    return seconds


def _start_session(
    recipe: Recipe, documents: Any, out: Path, track: Track, say: Say, verbs: set[str]
) -> Any:
    """Find what is wrong before anything is written."""
    session = new_session(recipe, documents, out, track)
    from qwlora.pipeline.preflight import preflight

    preflight(session, verbs, say)
    return session


def new_session(recipe: Recipe, documents: Any, out: Path, track: Track) -> Any:
    """Import torch and its friends."""
    _quiet_libraries()
    from qwlora.pipeline.context import Session

    return Session(recipe, documents, out, track)


def open_job(
    folder: Path,
    adapter: str | None = None,
    changes: tuple[str, ...] = (),
    track: Track = untracked,
) -> tuple[Any, str]:
    """The session of a job's directory, and the name of one of its trained adapters: the recipe's first unless given.

    Args:
        changes: to the directory's recipe, for this session alone; see `load_recipe`.

    Raises:
        DirectoryError: the folder is no job's directory, or has no such trained adapter.
        RecipeError: a change is of what base and adapters were made from, which are there already.
        FingerprintError: the adapter was trained on another base than the one that is there.
    """
    from qwlora.recipe import load_recipe

    if not (folder / "recipe.yaml").is_file():
        raise DirectoryError(
            f"{str(folder)!r} is no job's directory: it has no recipe.yaml; `qwlora run` makes one"
        )
    recipe = resolve_compute(load_recipe(folder / "recipe.yaml", changes))
    if made := tuple(change for change in changes if not _is_looked_at(change)):
        _refuse_changes(folder, made)
    name = adapter or recipe.adapters[0].name
    if not (folder / "adapters" / name).is_dir():
        known = ", ".join(adapter.name for adapter in recipe.adapters)
        raise DirectoryError(
            f"{str(folder)!r} has no trained adapter {name!r}; the recipe's are {known}. Train it: {command_line('train', folder)}"
        )
    documents = load_documents(
        recipe.data.source, recipe.data.held_out, recipe.seed, recipe.data.reading()
    )
    session = new_session(recipe, documents, folder, track)
    from qwlora.adapter.adapter_folder import check_adapter

    check_adapter(folder / "adapters" / name, session.base_fingerprint)
    return session, name


def command_line(verb: str, folder: Path) -> str:
    """What goes on with the job in `folder`."""
    return shlex.join(["qwlora", verb, "--out", str(folder)])


def is_calibrated(session: Any, name: str) -> bool:
    """Whether the session's job has a calibration of adapter `name`.

    Raises:
        CalibrationError: it has one that is not of the session's recipe, or of another adapter or base than those that are there now.
    """
    if not (session.path / "simulation" / name).is_dir():
        return False
    key = next(
        (
            stage.key
            for stage in make_plan(session.recipe, session.documents)
            if stage.name == f"calibrate/{name}"
        ),
        None,
    )
    if key is None:
        known = ", ".join(adapter.name for adapter in session.recipe.adapters)
        raise CalibrationError(
            f"adapter {name!r} in {str(session.path)!r} is left from another recipe; this one's are {known}"
        )
    if not Directory.read(session.path).is_current(f"calibrate/{name}", key):
        raise CalibrationError(
            f"the calibration of adapter {name!r} in {str(session.path)!r} is of another recipe, adapter or base than those that are there now; "
            f"calibrate again: {command_line('calibrate', session.path)}"
        )
    return True


def _is_looked_at(change: str) -> bool:
    """Whether a change is of what the session of a job does by itself, with the base and the adapters that are there."""
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
        raise RecipeError(
            str(path), [f"{asked}: nothing that is looked at here depends on it; leave it out"]
        )
    raise RecipeError(
        str(path),
        [
            f"{asked}: {', '.join(again)} would have to run again, and here only {', '.join(('simulation.*', *_COUNTS))} can be changed. "
            "Run it with the change first: "
            f"{shlex.join(['qwlora', 'run', str(path), '--out', str(folder), *_as_options(changes)])}"
        ],
    )


def _as_options(changes: Iterable[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def _plan_of(recipe: Recipe) -> list[Stage]:
    recipe = resolve_compute(recipe)
    return make_plan(
        recipe,
        load_documents(
            recipe.data.source, recipe.data.held_out, recipe.seed, recipe.data.reading()
        ),
    )


def _check_needs(
    plan: list[Stage],
    waiting: list[Stage],
    verbs: Collection[str],
    directory: Directory,
    command: Callable[[str], str],
) -> None:
    """Refuse stages whose needs are neither current nor asked for, naming every verb that has to run before."""
    needs, lacking = {s.name: s.needs for s in plan}, set[str]()

    def look(name: str) -> None:
        for need in (
            s
            for s in plan
            if s.name in needs[name] and s.verb not in verbs and s.name not in lacking
        ):
            if not directory.is_current(need.name, need.key):
                lacking.add(need.name)
                look(need.name)

    for stage in waiting:
        look(stage.name)
        if lacking:
            first = dict.fromkeys(s.verb for s in plan if s.name in lacking)
            raise DirectoryError(
                f"{stage.verb} needs {', '.join(s.name for s in plan if s.name in lacking)}, missing or out of date in {str(directory.path)!r}. "
                f"Run first: {' && '.join(command(verb) for verb in VERBS if verb in first)}"
            )


def _write_results(directory: Directory, recipe: Recipe, plan: list[Stage]) -> dict[str, Any]:
    results: dict[str, Any] = {"format": RESULTS_FORMAT, "recipe": recipe.name, "stages": {}}
    if recipe.model.trust_remote_code:
        results["trust_remote_code"] = True
    for stage in plan:
        if (record := directory.records.get(stage.name)) and record.key == stage.key:
            _merge(results, record.results)
            entry = results["stages"].setdefault(stage.verb, {"seconds": 0.0})
            entry["seconds"] += record.seconds
    with explained(directory.path):
        write_text(directory.path / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _merge(into: dict[str, Any], part: dict[str, Any]) -> None:
    for key, value in part.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)  # records stay as their stages wrote them


def _quiet_libraries() -> None:
    """Libraries draw no bars and print no notices of their own; what matters comes as an error."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=SlowComputeWarning)  # preflight has said it
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("torch.onnx", "torch.onnx._internal.exporter._registration", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
