"""Add, import, rename and remove the adapters of a job. No other adapter's files or records change.

A change of the recipe must leave the base and the other adapters as they are; if it does not, it is
refused before anything is written. Only encodings that adapters share are calibrated again.

The recipe is read under the job's lock. A change is made completely, by the next command if this
one is killed (`journal.py`); so a command that is repeated after a kill finds its change made.

All functions raise:

    DirectoryError    the folder is not a job directory, or is in use; there is no such adapter, or
                      there is one already
    RecipeError       a setting is not valid, or the base or another adapter would change
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError, RecipeError, SourceError
from qwlora.formats.model_source import user_path
from qwlora.pipeline.job.digests import Digests
from qwlora.pipeline.job.directory import Directory
from qwlora.pipeline.job.stage_records import Stage
from qwlora.pipeline.plan.plan import CASES, JobTexts, make_plan, resolve_compute
from qwlora.pipeline.plan.stale_stages import adapter_named
from qwlora.recipe import Recipe, parse_recipe
from qwlora.system.atomic import flush
from qwlora.targets.proof.folder import PROOF_RECORD, renamed_proof
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import AND

IMPORTS = ".qwlora/imports"  # converted sources of adapters, by the digest of their content


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
    """
    command: list[str | None] = ["add", name, data, like, *changes]
    with Directory.edit(folder) as (directory, recipe, finished):
        if finished == command:
            return
        model = adapter_named(recipe, like or recipe.adapters[0].name, folder)
        entry = {**model.model_dump(mode="json"), "name": name}
        if data is not None:
            entry["data"] = {**recipe.data_of(model).model_dump(mode="json"), "source": data}
        changed = _with_adapter(folder, recipe, entry, changes)
        _check_kept(*_plans(folder, recipe, changed), folder)
        directory.change(command, changed)


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
        ExportError, TrainingError: a target of the job cannot hold it.
    """
    from qwlora.adapter.adapter_files import convert_mlx_adapter, is_mlx_adapter
    from qwlora.adapter.attach import check_existing
    from qwlora.pipeline.running.preflight import check_places
    from qwlora.pipeline.stages.job_context import skeleton

    command: list[str | None] = ["import", name, source, data, str(continues), *changes]
    with Directory.edit(folder) as (directory, recipe, finished):
        if finished == command:
            return
        if not (is_mlx := is_mlx_adapter(path := user_path(source))):
            shapes = check_existing(source, "accept", skeleton(recipe.model))
        entry: dict[str, Any] = {"name": name, "continue_from": source, "unknown_base": "accept"}
        if not continues:
            entry["steps"] = 0
        if data is not None:
            entry["data"] = {**recipe.data.model_dump(mode="json"), "source": data}
        changed = _with_adapter(folder, recipe, entry, changes)  # before anything is written
        moves: list[tuple[str, str]] = []
        with directory.scratch() as scratch:
            if is_mlx:
                convert_mlx_adapter(path, scratch)
                flush(scratch)
                place = f"{IMPORTS}/{_content_digest(scratch)}"
                if not (folder / place).exists():
                    moves = [(str(scratch.relative_to(folder)), place)]
                elif (now := _content_digest(folder / place)) != Path(place).name:
                    raise DirectoryError(
                        f"{str(folder / place)!r} has other content than when it was imported "
                        f"(SHA-256 {now[:16]}); move it away, then import again"
                    )
                try:
                    shapes = check_existing(str(scratch), "accept", skeleton(recipe.model))
                except SourceError as error:
                    raise SourceError(str(error).replace(str(scratch), source)) from error
                imported = {"continue_from": str(folder.absolute() / place)}
                *others, adapter = changed.adapters
                adapters = [*others, adapter.model_copy(update=imported)]
                changed = changed.model_copy(update={"adapters": adapters})
            check_places(changed, {name: shapes}, skeleton(recipe.model))
            _check_kept(*_plans(folder, recipe, changed), folder)
            directory.change(command, changed, moves=moves)


def rename_adapter(folder: Path, old: str, new: str) -> None:
    """Rename an adapter in the recipe, its folders, its records and results.

    Files of use cases have the names of adapters in them; the next run writes them again.
    """
    command: list[str | None] = ["rename", old, new]
    with Directory.edit(folder) as (directory, recipe, finished):
        if finished == command:
            return
        adapter_named(recipe, old, folder)
        content = recipe.model_dump(mode="json")
        for adapter in content["adapters"]:
            for key in ("name", "continue_from"):
                if adapter[key] == old:
                    adapter[key] = new
        names = recipe.base.calibrate_on
        content["base"]["calibrate_on"] = [new if name == old else name for name in names]
        if (cases := recipe.export.use_cases) is not None:
            parts = ([new if n == old else n for n in case.split(AND)] for case in cases)
            content["export"]["use_cases"] = [*map(AND.join, parts)]
        changed = _parsed(folder, content)
        before, after = _plans(folder, recipe, changed)
        together = {name for name, target in TARGETS.items() if target.has_cases}  # names inside
        renamed = [
            (b, a)
            for b, a in zip(before, after, strict=True)
            if b != a and b.name != CASES and not together & set(b.name.split("/")[1:2])
        ]
        files = dict[str, str]()
        for stage, now in renamed:  # a proof belongs to the name that is in it
            proof = folder / (stage.artifact or "") / PROOF_RECORD
            is_whole = stage.verb == "verify" and directory.problem(stage.name, None) is None
            if is_whole and proof.is_file():
                files[f"{now.artifact}/{PROOF_RECORD}"] = renamed_proof(proof, new)

        def in_results(results: Any, depth: int = 4) -> Any:
            """With the key `old` replaced, down to the depth at which names of adapters are."""
            if not isinstance(results, dict) or not depth:
                return results
            return {
                new if key == old else key: in_results(value, 2 if key == "tasks" else depth - 1)
                for key, value in results.items()
            }

        directory.change(command, changed, renamed=renamed, in_results=in_results, files=files)


def remove_adapter(folder: Path, name: str, confirm: Callable[[], None] = lambda: None) -> None:
    """Remove an adapter from the recipe, with its files and records.

    Args:
        confirm: called before anything is deleted, if the adapter can be removed.

    Raises:
        DirectoryError: also if it is the only one, another adapter continues it, or the base was
            calibrated on its text.
    """
    command: list[str | None] = ["remove", name]
    with Directory.edit(folder) as (directory, recipe, finished):
        if finished == command:
            return
        adapter = adapter_named(recipe, name, folder)
        if len(recipe.adapters) == 1:
            raise DirectoryError(
                f"{name!r} is the only adapter of {str(folder)!r}, and a recipe needs one; delete "
                "the directory, or add another adapter first"
            )
        if continued := [a.name for a in recipe.adapters if a.continue_from == name]:
            raise DirectoryError(
                f"adapter {name!r} is continued by {', '.join(continued)}; remove these first"
            )
        if name in recipe.base.calibrate_on or (
            recipe.data.source is None and name in recipe.texts() and not recipe.base.calibrate_on
        ):
            raise DirectoryError(
                f"the base was calibrated on the text of adapter {name!r}, so without it the base "
                "would change; keep the adapter in the recipe"
            )
        content = recipe.model_dump(mode="json")
        content["adapters"] = [a for a in content["adapters"] if a["name"] != name]
        changed = _parsed(folder, content)
        before, after = _plans(folder, recipe, changed)
        _check_kept(before, after, folder, gone=name)
        unused = []  # the converted source, if no other adapter has it
        if adapter.continue_from not in [a.continue_from for a in changed.adapters]:
            source = Path(adapter.continue_from or "")
            if source.resolve().parent == (folder / IMPORTS).resolve():
                unused = [f"{IMPORTS}/{source.name}"]
        confirm()
        removed = [stage for stage in before if stage.adapter == name]
        directory.change(command, changed, removed=removed, removals=unused)


def _parsed(folder: Path, content: dict[str, Any], changes: tuple[str, ...] = ()) -> Recipe:
    return resolve_compute(parse_recipe(content, str(folder / "recipe.yaml"), changes))


def _with_adapter(
    folder: Path, recipe: Recipe, entry: dict[str, Any], changes: tuple[str, ...]
) -> Recipe:
    """The recipe with another adapter at its end."""
    content, name = recipe.model_dump(mode="json"), entry["name"]
    if name in {adapter.name for adapter in recipe.adapters}:
        raise DirectoryError(
            f"{str(folder)!r} already has adapter {name!r}; choose another name, or change its "
            "settings in a run with --replace"
        )
    content["adapters"].append(entry)
    if recipe.data.source is None and not recipe.base.calibrate_on:
        content["base"]["calibrate_on"] = list(recipe.texts())  # what the base was calibrated on
    changes = tuple(f"adapters.{len(recipe.adapters)}.{change}" for change in changes)
    return _parsed(folder, content, changes)


def _plans(folder: Path, before: Recipe, after: Recipe) -> tuple[list[Stage], list[Stage]]:
    """The plans of both recipes; a source that both have is read once."""
    texts, digests = JobTexts(after), Digests(folder / ".qwlora" / "digests.json")
    return make_plan(resolve_compute(before), texts, digests), make_plan(after, texts, digests)


def _check_kept(
    before: Sequence[Stage], after: Sequence[Stage], folder: Path, gone: str = ""
) -> None:
    """Check that the base and all adapters but `gone` stay as they are."""
    keys = {stage.name: stage.key for stage in after}
    kept = [s for s in before if s.verb in ("quantize", "calibrate-base", "train")]
    if differ := [s.name for s in kept if keys.get(s.name, s.key) != s.key and s.adapter != gone]:
        problem = (
            f"this would change {', '.join(differ)}, which exist already: whether an adapter has "
            "init qera decides what the base stores. Keep that as it is, or use a new directory"
        )
        raise RecipeError(str(folder / "recipe.yaml"), [problem])


def _content_digest(folder: Path) -> str:
    """SHA-256 of the names and contents of the files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name}\0{Digests().content(path)}\0".encode())
    return digest.hexdigest()
