"""Add, import, rename and remove the adapters of a job. No other adapter's files or records change.

A change of the recipe must leave the base and the other adapters as they are; if it does not, it is
refused before anything is written. Only encodings that adapters share are calibrated again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwlora.atomic import replacing_files
from qwlora.errors import DirectoryError, RecipeError
from qwlora.export.bundle import current_proofs, write_readme
from qwlora.export.registry import TARGETS
from qwlora.export.target import BundleTarget, UseCasesTarget
from qwlora.formats.user_path import user_path
from qwlora.messages import suggestion
from qwlora.pipeline.digests import Digests
from qwlora.pipeline.directory import Directory
from qwlora.pipeline.job_texts import JobTexts
from qwlora.pipeline.plan import make_plan, resolve_compute
from qwlora.pipeline.stage import Stage
from qwlora.pipeline.stages.calibrate_stage import CASES
from qwlora.recipe import Recipe, load_recipe, parse_recipe


def add_adapter(
    folder: Path,
    name: str,
    data: str | None = None,
    like: str | None = None,
    changes: tuple[str, ...] = (),
) -> None:
    """Add an adapter to the recipe of a job; it is trained by the job's next run.

    Args:
        data: source of its text. Default: that of `like`.
        like: the adapter whose settings it takes. Default: the first in the recipe.
        changes: changes to these settings, `key=value`.

    Raises:
        DirectoryError: the folder is not a job directory, has such an adapter, or the base would
            change.
        RecipeError: a setting is not valid.
    """
    recipe = _recipe(folder)
    _check_new(recipe, name, folder)
    model = _named(recipe, like or recipe.adapters[0].name, folder)
    entry = {**model.model_dump(mode="json"), "name": name}
    if data is not None:
        own = recipe.data_of(model).model_dump(mode="json")
        entry["data"] = {**own, "source": data}
    _append(folder, recipe, entry, changes)


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
        data: source of its text. Default: the data section's.
        continues: train it on this base; default: use it as it is.
        changes: changes to its settings, `key=value`.

    Raises:
        SourceError: there is no LoRA adapter at `source`, or it does not fit the model.
        DirectoryError, RecipeError: as for `add_adapter`.
    """
    from qwlora.adapter.attach import check_existing
    from qwlora.adapter.mlx_adapter import convert_mlx_adapter, is_mlx_adapter
    from qwlora.pipeline.context import skeleton

    recipe = _recipe(folder)
    _check_new(recipe, name, folder)
    if is_mlx_adapter(found := user_path(source)):
        converted = folder / ".qwlora" / "imports" / name
        with replacing_files(converted) as scratch:
            convert_mlx_adapter(found, scratch)
        source = str(converted)
    check_existing(source, "accept", skeleton(recipe.model))
    entry: dict[str, Any] = {"name": name, "continue_from": source, "unknown_base": "accept"}
    if not continues:
        entry |= {"steps": 0}
    if data is not None:
        entry["data"] = {**recipe.data.model_dump(mode="json"), "source": data}
    _append(folder, recipe, entry, changes)


def rename_adapter(folder: Path, old: str, new: str) -> None:
    """Rename an adapter in the recipe, its folders, its records and results.

    Files of use cases have the names of adapters in them; the next run writes them again.

    Raises:
        DirectoryError, RecipeError: as for `add_adapter`.
    """
    recipe = _recipe(folder)
    _named(recipe, old, folder)
    content = recipe.model_dump(mode="json")
    for adapter in content["adapters"]:
        for key in ("name", "continue_from"):
            if adapter[key] == old:
                adapter[key] = new
    on = content["base"]["calibrate_on"]
    content["base"]["calibrate_on"] = [new if name == old else name for name in on]
    changed = resolve_compute(parse_recipe(content, str(folder / "recipe.yaml")))
    before, after = _plans(folder, recipe, changed)
    with Directory.open(folder, recipe) as directory:
        directory.rename_stages(
            [
                (b, a)
                for b, a in zip(before, after, strict=True)
                if b != a and not _is_of_use_cases(b)
            ],
            lambda results: _renamed(results, old, new),
            changed,
        )
        _write_readmes(directory, changed)


def remove_adapter(folder: Path, name: str) -> None:
    """Remove an adapter from the recipe, with its files and records.

    Raises:
        DirectoryError: the folder is not a job directory, has no such adapter or only this one;
            another adapter continues it; or the base was calibrated on its text.
    """
    recipe = _recipe(folder)
    _named(recipe, name, folder)
    if len(recipe.adapters) == 1:
        raise DirectoryError(
            f"{name!r} is the only adapter of {str(folder)!r}, and a recipe needs one; delete the "
            "directory, or add another adapter first"
        )
    if continued := [a.name for a in recipe.adapters if a.continue_from == name]:
        raise DirectoryError(
            f"adapter {name!r} is continued by {', '.join(continued)}; remove these first"
        )
    content = recipe.model_dump(mode="json")
    content["adapters"] = [a for a in content["adapters"] if a["name"] != name]
    if name in recipe.base.calibrate_on or (
        recipe.data.source is None and name in recipe.texts() and not recipe.base.calibrate_on
    ):
        raise DirectoryError(
            f"the base was calibrated on the text of adapter {name!r}, so without it the base "
            "would change; keep the adapter in the recipe"
        )
    _rewrite(folder, recipe, content, gone=name)


def _recipe(folder: Path) -> Recipe:
    if not (folder / "recipe.yaml").is_file():
        raise DirectoryError(
            f"{str(folder.absolute())!r} is not a job directory: it has no recipe.yaml; "
            "`qwlora run` creates one"
        )
    return resolve_compute(load_recipe(folder / "recipe.yaml"))


def _check_new(recipe: Recipe, name: str, folder: Path) -> None:
    if name in {a.name for a in recipe.adapters}:
        raise DirectoryError(
            f"{str(folder)!r} already has adapter {name!r}; choose another name, or change its "
            "settings in a run with --replace"
        )


def _append(folder: Path, recipe: Recipe, entry: Any, changes: tuple[str, ...]) -> None:
    """Append an adapter to the recipe of a job."""
    content = recipe.model_dump(mode="json")
    content["adapters"].append(entry)
    if recipe.data.source is None and not recipe.base.calibrate_on:
        content["base"]["calibrate_on"] = list(recipe.texts())  # what the base was calibrated on
    position = len(recipe.adapters)
    _rewrite(folder, recipe, content, tuple(f"adapters.{position}.{c}" for c in changes))


def _named(recipe: Recipe, name: str, folder: Path) -> Any:
    found = next((a for a in recipe.adapters if a.name == name), None)
    if found is None:
        known = [a.name for a in recipe.adapters]
        raise DirectoryError(f"{str(folder)!r} has no adapter {name!r}{suggestion(name, known)}")
    return found


def _plans(folder: Path, before: Recipe, after: Recipe) -> tuple[list[Stage], list[Stage]]:
    """The plans of both recipes; a source that both have is read once."""
    texts, digests = JobTexts(after), Digests(folder / ".qwlora" / "digests.json")
    return make_plan(before, texts, digests), make_plan(after, texts, digests)


def _rewrite(
    folder: Path,
    recipe: Recipe,
    content: Mapping[str, Any],
    changes: tuple[str, ...] = (),
    gone: str | None = None,
) -> None:
    """Write the changed recipe, if the base and the other adapters stay as they are.

    Args:
        gone: an adapter to delete.
    """
    changed = resolve_compute(parse_recipe(content, str(folder / "recipe.yaml"), changes))
    before, after = _plans(folder, recipe, changed)
    keys = {stage.name: stage.key for stage in after}
    differ = [
        stage.name
        for stage in before
        if stage.verb in ("quantize", "calibrate-base", "train")
        and (gone is None or stage.adapter != gone)
        and keys.get(stage.name, stage.key) != stage.key
    ]
    if differ:
        raise RecipeError(
            str(folder / "recipe.yaml"),
            [
                f"this would change {', '.join(differ)}, which exist already. Use the same init, "
                "or a new directory"
            ],
        )
    with Directory.open(folder, changed) as directory:
        if gone is not None:
            directory.discard([s for s in before if s.adapter == gone])
            _write_readmes(directory, changed)


def _is_of_use_cases(stage: Stage) -> bool:
    """Whether a stage's files hold all use cases, by name."""
    target = stage.name.split("/")[1:2]
    return stage.name == CASES or any(isinstance(TARGETS.get(t), UseCasesTarget) for t in target)


def _write_readmes(directory: Directory, recipe: Recipe) -> None:
    """Write README.md of every bundle, of the adapters that passed and are there."""
    for target in recipe.export.targets:
        bundle = directory.path / "export" / target
        if isinstance(TARGETS[target], BundleTarget) and bundle.is_dir():
            passed = {
                name: proof
                for name, proof in current_proofs(bundle).items()
                if f"verify/{target}/{name}" in directory.records
            }
            write_readme(bundle, passed)


def _renamed(results: Any, old: str, new: str, depth: int = 4) -> Any:
    """`results` with the key `old` replaced, down to the depth at which names of adapters are."""
    if not isinstance(results, dict) or not depth:
        return results
    return {
        new if key == old else key: _renamed(value, old, new, depth - 1)
        for key, value in results.items()
    }
