"""Add, import, rename and remove the adapters of a job. No other adapter's files or records change.

Only encodings that adapters share are calibrated again.

All functions raise DirectoryError (no job, in use, no such adapter, or one already) and RecipeError
(a setting is not valid).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwlora.data.read_source import load_documents, locate_documents
from qwlora.errors import DirectoryError
from qwlora.pipeline.job import (
    adapter_named,
    command_line,
    job_recipe,
    move,
    settle,
    sources_of,
    write_bundle_readmes,
)
from qwlora.pipeline.plan import make_plan
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.store import STAGES, Store, check_job
from qwlora.recipe import Recipe, parse_recipe
from qwlora.recipe.recipe_text import edited
from qwlora.recipe.section import of_a_job
from qwlora.system.atomic import write_text
from qwlora.system.output_path import as_directory_errors
from qwlora.system.progress import untracked
from qwlora.targets.target import AND

# Where the stages of an adapter write.
_FOLDERS = (
    *("adapters/{}", "simulation/{}", ".qwlora/reference/{}", "export/*/{}", "export/*/proof/{}"),
    *(f"{STAGES}/*/*/{{}}.json", f"{STAGES}/*/*/{{}}/on/*.json"),
)


def add_adapter(
    folder: Path,
    name: str,
    data: str | None = None,
    like: str | None = None,
    changes: tuple[str, ...] = (),
) -> None:
    """Add an adapter to the recipe of a job; it is trained by the job's next run.

    Args:
        like: the adapter whose settings and text it takes. Default: the first in the recipe.
        changes: changes to these settings, `key=value`.
    """
    with _editing(folder) as (store, recipe):
        model = adapter_named(recipe, like or recipe.adapters[0].name, folder)
        entry = {**model.model_dump(mode="json", exclude_unset=True), "name": name}
        changed = _with_adapter(folder, recipe, entry, data, changes)
        _write(store, recipe, changed)


def import_adapter(
    folder: Path,
    name: str,
    source: str,
    data: str | None = None,
    continues: bool = False,
    changes: tuple[str, ...] = (),
) -> None:
    """Add an adapter that was trained elsewhere, on the float model or other integers.

    Args:
        source: a folder of PEFT or of mlx-lm, or a hub id.
        continues: train it on this base; default: use it as it is.

    Raises:
        SourceError: there is no LoRA adapter at `source`, or it does not fit the model.
        ExportError, TrainingError: a target of the job cannot hold it.
    """
    from qwlora.adapter.attach import check_existing
    from qwlora.pipeline.preflight import check_places
    from qwlora.pipeline.stages.job_context import skeleton

    with _editing(folder) as (store, recipe):
        shapes = check_existing(source, "accept", skeleton(recipe.model))
        entry: dict[str, Any] = {"name": name, "continue_from": source, "unknown_base": "accept"}
        if not continues:
            entry["steps"] = 0
        changed = _with_adapter(folder, recipe, entry, data, changes)
        check_places(changed, {name: shapes}, skeleton(recipe.model))
        _write(store, recipe, changed)


def rename_adapter(folder: Path, old: str, new: str) -> None:
    """Rename an adapter in the recipe, and its folders."""
    with _editing(folder) as (store, recipe):
        adapter_named(recipe, old, folder)
        content = recipe.model_dump(mode="json", exclude_unset=True)
        for adapter in content["adapters"]:
            for key in ("name", "continue_from"):
                if adapter.get(key) == old:
                    adapter[key] = new
        if names := recipe.base.calibrate_on:
            content["base"]["calibrate_on"] = [new if name == old else name for name in names]
        if (cases := recipe.export.use_cases) is not None:
            parts = ([new if n == old else n for n in case.split(AND)] for case in cases)
            content["export"]["use_cases"] = [*map(AND.join, parts)]
        changed = _parsed(folder, content)
        if os.path.lexists(folder / "adapters" / new):
            raise DirectoryError(
                f"{str(folder / 'adapters' / new)!r} exists, but belongs to no adapter of the "
                "recipe. Choose another name, or move it away"
            )
        plan, moves = _plan(store, changed), dict[str, str]()
        for before, after in zip(_plan(store, recipe), plan, strict=True):
            # Files of use cases have the names of adapters in them: the next run writes them again.
            if before.case is None and before.place != after.place:
                store.check_replaceable(before.place)
                store.check_replaceable(after.place)
                moves |= {before.place: after.place} if before.place in store.records else {}
        # The recipe first: if this is killed now, the next command moves what has another name.
        _write(store, recipe, changed)
        move(store, plan, moves)
        write_bundle_readmes(store)


def remove_adapter(folder: Path, name: str, confirm: Callable[[], None] = lambda: None) -> None:
    """Remove an adapter from the recipe, with its files and records. `confirm` is called before
    anything is deleted."""
    with _editing(folder) as (store, recipe):
        paths = (p for pattern in _FOLDERS for p in folder.glob(pattern.format(name)))
        existing = {str(path.relative_to(folder)) for path in paths}
        places = sorted(existing & (store.records.keys() | store.damaged))
        for place in places:
            store.check_replaceable(place)
        # The user may have removed it from the recipe before.
        if name not in {adapter.name for adapter in recipe.adapters}:
            if f"adapters/{name}" not in places:
                adapter_named(recipe, name, folder)
            confirm()
            with store.removing(places):
                return
        adapter_named(recipe, name, folder)
        if len(recipe.adapters) == 1:
            raise DirectoryError(
                f"{name!r} is the only adapter of {str(folder)!r}, and a recipe needs one. Delete "
                "the directory, or add another adapter first"
            )
        if continued := [a.name for a in recipe.adapters if a.continue_from == name]:
            raise DirectoryError(
                f"adapter {name!r} is continued by {', '.join(continued)}. Remove these first"
            )
        if name in recipe.base.calibrate_on or (
            recipe.data.source is None and name in recipe.texts() and not recipe.base.calibrate_on
        ):
            raise DirectoryError(
                f"the base was calibrated on the text of adapter {name!r}, so removing it would "
                "change the base. Keep the adapter in the recipe"
            )
        content = recipe.model_dump(mode="json", exclude_unset=True)
        content["adapters"] = [a for a in content["adapters"] if a["name"] != name]
        changed = _parsed(folder, content)
        confirm()
        with store.removing(places):
            _write(store, recipe, changed)
        write_bundle_readmes(store)


@contextmanager
def _editing(folder: Path) -> Iterator[tuple[Store, Recipe]]:
    check_job(folder)
    store = Store(folder)
    with store.locked(), as_directory_errors(folder):
        # Read under the lock, so that no change by another command is lost.
        recipe = job_recipe(folder)
        settle(store, recipe)
        yield store, recipe


def _plan(store: Store, recipe: Recipe) -> list[Stage]:
    return make_plan(recipe, sources_of(recipe, store, untracked, reads=False))


def _write(store: Store, before: Recipe, after: Recipe) -> None:
    path = store.path / "recipe.yaml"
    write_text(path, edited(path.read_text(encoding="utf-8"), before, after, path))


def _parsed(folder: Path, content: dict[str, Any], changes: tuple[str, ...] = ()) -> Recipe:
    with of_a_job():
        return parse_recipe(content, str(folder / "recipe.yaml"), changes)


def _with_adapter(
    folder: Path,
    recipe: Recipe,
    entry: dict[str, Any],
    source: str | None,
    changes: tuple[str, ...],
) -> Recipe:
    """The recipe with another adapter at its end. Without `source`, its text is that of `entry`."""
    if source is not None:
        locate_documents(source)
        entry["data"] = {**(entry.get("data") or {}), "source": source}
    content, name = recipe.model_dump(mode="json", exclude_unset=True), entry["name"]
    if name in {adapter.name for adapter in recipe.adapters}:
        raise DirectoryError(
            f"{str(folder)!r} already has adapter {name!r}; choose another name, or change its "
            f"settings in recipe.yaml, then: {command_line('run', folder, '--replace', name)}"
        )
    content["adapters"].append(entry)
    # Without a text of its own, the base was calibrated on those of all adapters until now.
    if recipe.data.source is None and not recipe.base.calibrate_on:
        content.setdefault("base", {})["calibrate_on"] = list(recipe.texts())
    changes = tuple(f"adapters.{len(recipe.adapters)}.{change}" for change in changes)
    changed = _parsed(folder, content, changes)
    data = changed.data_of(name)
    if source is not None and data.source is not None:
        # Read now: a wrong column must be found before the adapter is in the recipe.
        load_documents(data.source, data.held_out, changed.seed, data.reading())
    return changed
