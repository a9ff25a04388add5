"""Protects trained adapters: one that was trained with other settings is not replaced unasked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from qwlora.errors import DirectoryError, RecipeError
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.plan.stage import Stage
from qwlora.pipeline.plan.stale_stages import upstream
from qwlora.recipe import Adapter, Recipe, load_recipe


def trained_with(recipe: Recipe, adapter: Adapter) -> dict[str, Any]:
    """The settings that an adapter is trained with, without defaults: recorded in the results."""
    found = adapter.model_dump(mode="json", exclude_defaults=True, exclude={"name", "data"})
    data = recipe.data_of(adapter).model_dump(mode="json", exclude_defaults=True)
    return {**found, "data": data, "seed": recipe.seed, "workflow": recipe.workflow}


def check_kept(
    plan: Sequence[Stage],
    waiting: Iterable[Stage],
    directory: Directory,
    recipe: Recipe,
    stale: Mapping[str, str],
) -> None:
    """Check that no stage that is about to run replaces an adapter trained with other settings.

    An adapter whose files are missing or damaged is trained again with the same settings, which
    replaces nothing.

    Raises:
        DirectoryError: one would be replaced; says what differs.
    """
    records = directory.records
    again = {s.name for s in waiting if s.name in records and records[s.name].key != s.key}
    problems = []
    for adapter in recipe.adapters:
        stage = f"train/{adapter.name}"
        if stage in again and (directory.path / "adapters" / adapter.name).is_dir():
            old = records[stage].results.get("train", {}).get(adapter.name, {})
            reasons = _differences(old.get("settings", {}), trained_with(recipe, adapter))
            changed = [s.name for s in upstream(plan, stage) if s.name in again and s.name != stage]
            reasons += [f"{name}: {stale[name]}" for name in changed]
            problems.append(f"{adapter.name}: {'; '.join(reasons) or stale[stage]}")
    if not problems and "quantize" in again:
        trained = sorted(path.name for path in (directory.path / "adapters").glob("*"))
        problems = [f"{', '.join(trained)}: their base would be replaced"] if trained else []
    if "quantize" in again and problems:
        with contextlib.suppress(RecipeError):
            before, now = (
                {"model": r.model.model_dump(mode="json"), "base": r.base.model_dump(mode="json")}
                for r in (load_recipe(directory.path / "recipe.yaml"), recipe)
            )
            problems += _differences(before, now)
    if problems:
        raise DirectoryError(
            f"{str(directory.path)!r} has adapters that were trained differently:\n"
            + "".join(f"  {problem}\n" for problem in problems)
            + "Nothing was changed. Give the new adapter another name, use another --out, or "
            "replace the old one with --replace (it stays in place until the new one is finished)"
        )


def check_none_lost(directory: Directory, recipe: Recipe) -> None:
    """Check that the recipe has every adapter that was trained in the directory.

    Raises:
        DirectoryError: it lacks one, such as one that was added with `qwlora adapters add`.
    """
    names = {adapter.name for adapter in recipe.adapters}
    folder = directory.path / "adapters"
    others = [name for name in directory.trained_adapters() if name not in names]
    if lost := [name for name in others if (folder / name).is_dir()]:
        raise DirectoryError(
            f"{str(directory.path)!r} has adapters {', '.join(lost)}, which this recipe lacks. Run "
            f"{str(directory.path / 'recipe.yaml')!r}, add them to the recipe, or remove them: "
            f"qwlora adapters remove {directory.path} {lost[0]}"
        )


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old value, now new value` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        ]
    if old == new:
        return []
    shown = ["the default" if value is None else f"{value!r}" for value in (old, new)]
    return [f"{path}: {shown[0]}, now {shown[1]}"]
