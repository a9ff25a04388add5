"""Protects trained adapters: one that was trained with other settings is not replaced unasked."""

from __future__ import annotations

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
    by_name = {stage.name: stage for stage in waiting if _differs(stage, directory)}
    problems = []
    for adapter in recipe.adapters:
        stage = by_name.get(f"train/{adapter.name}")
        if stage is not None and (directory.path / "adapters" / adapter.name).is_dir():
            old = directory.records[stage.name].results.get("train", {}).get(adapter.name, {})
            found = _differences(old.get("settings"), trained_with(recipe, adapter))
            changed = [need.name for need in upstream(plan, stage.name) if need.name in by_name]
            found += [f"{name}: {stale[name]}" for name in changed if name != stage.name]
            problems.append(f"{adapter.name}: {'; '.join(found) or stale[stage.name]}")
    if not problems and "quantize" in by_name:
        trained = sorted(path.name for path in (directory.path / "adapters").glob("*"))
        problems = [f"{', '.join(trained)}: their base would be replaced"] if trained else []
    if "quantize" in by_name and problems:
        problems += _base_differences(directory, recipe)
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
    lost = [
        name
        for name in directory.trained_adapters()
        if name not in names and (directory.path / "adapters" / name).is_dir()
    ]
    if lost:
        raise DirectoryError(
            f"{str(directory.path)!r} has adapters {', '.join(lost)}, which this recipe lacks. Run "
            f"{str(directory.path / 'recipe.yaml')!r}, add them to the recipe, or remove them: "
            f"qwlora adapters remove {directory.path} {lost[0]}"
        )


def _differs(stage: Stage, directory: Directory) -> bool:
    """Whether a stage ran before, with other inputs."""
    record = directory.records.get(stage.name)
    return record is not None and record.key != stage.key


def _base_differences(directory: Directory, recipe: Recipe) -> list[str]:
    """What differs between the recipe in the directory and this one, in its base and model."""
    try:
        old = load_recipe(directory.path / "recipe.yaml")
    except RecipeError:
        return []
    before, now = (
        {"model": r.model.model_dump(mode="json"), "base": r.base.model_dump(mode="json")}
        for r in (old, recipe)
    )
    return _differences(before, now)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """`key: old value, now new value` for every leaf that differs."""
    if old is None and not path:  # trained by a version that did not record its settings
        return []
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
