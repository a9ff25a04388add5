"""The ownership marker of a job directory: what the job wrote there, and so may replace.

`.qwlora/owner.json` is the first file written to a new directory. It holds

    recipe, model    name and model of the recipe that the directory belongs to
    artifacts        files that the job wrote, by folder
    recipes          SHA-256 of the versions of recipe.yaml that the job wrote

A directory without a marker does not belong to a job. Older versions wrote no marker; their jobs
are recognized by `.qwlora/stages.json` and get one the next time they run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qwlora import strict_json
from qwlora.errors import DirectoryError
from qwlora.recipe.yaml_core import load_yaml

OWNER_FORMAT = 1
_BEFORE_MARKER = {"lock", ".owner.json.part", "digests.json", ".digests.json.part"}


@dataclass
class Owner:
    """Content of the marker.

    Args:
        artifacts: files by folder. Folders are relative to the job's directory, files to their
            folder.
        recipes: SHA-256 of the last two versions of `recipe.yaml` that the job wrote. Two, because
            a run killed in between leaves the older one in place.
    """

    recipe: str
    model: str
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    recipes: list[str] = field(default_factory=list)

    def after(self, moved: Sequence[tuple[str, str]], removed: Sequence[str], recipe: str) -> Owner:
        """The marker after artifacts were moved or removed, and a recipe was written (SHA-256)."""
        names = dict(moved)
        artifacts = {names.get(a, a): f for a, f in self.artifacts.items() if a not in removed}
        return Owner(self.recipe, self.model, artifacts, [*self.recipes[-1:], recipe])

    def to_json(self) -> str:
        return strict_json.dumps({"format": OWNER_FORMAT, **asdict(self)}, indent=1) + "\n"


def read_owner(path: Path) -> Owner | None:
    """The owner of the job directory `path`; None if it is not a job directory.

    Raises:
        DirectoryError: the marker is damaged or of a newer version, or a job without a marker has
            no readable recipe.
    """
    marker = path / ".qwlora" / "owner.json"
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        return _parse(content)
    except (FileNotFoundError, NotADirectoryError):
        return _owner_without_marker(path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DirectoryError(
            f"{str(marker)!r} is damaged ({error}). It marks the directory as made by qwlora. "
            "Restore it; or, if you are sure that the directory belongs to this job, delete the "
            "file, and the next run writes it again."
        ) from error


def is_unclaimed(path: Path) -> bool:
    """Whether the folder `path` is empty, except for what a process leaves that is killed before it
    wrote the marker."""
    inside = set(os.listdir(path))
    private = path / ".qwlora"
    if inside - {private.name}:
        return False
    return not inside or (private.is_dir() and set(os.listdir(private)) <= _BEFORE_MARKER)


def files_in(folder: Path) -> list[str]:
    """All files under `folder`, relative to it. Includes links, but does not follow them."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(found)


def check_replaceable(target: Path, known: set[str]) -> None:
    """Check that everything at `target` was made by the job.

    Args:
        known: files at `target` that the job made, relative to it.

    Raises:
        DirectoryError: there is something else.
    """
    if not os.path.lexists(target):
        return
    is_folder = target.is_dir() and not target.is_symlink()
    foreign = [name for name in files_in(target) if name not in known] if is_folder else []
    if is_folder and not foreign:
        return
    what = (
        f"{str(target)!r} contains {foreign[0]!r}"
        + (f" and {len(foreign) - 1} more files" if len(foreign) > 1 else "")
        if is_folder
        else f"{str(target)!r} exists and is not a folder"
    )
    raise DirectoryError(
        f"{what}, which this job did not make according to its records, but would replace. "
        "Nothing was changed. Move it out of the job's directory and run again."
    )


def _parse(content: Any) -> Owner:
    if content["format"] != OWNER_FORMAT:
        raise ValueError(f"format {content['format']!r}, known: {OWNER_FORMAT}")
    artifacts = {str(k): [str(file) for file in v] for k, v in content["artifacts"].items()}
    if not all(isinstance(content[key], str) for key in ("recipe", "model")):
        raise TypeError("recipe and model must be strings")
    recipes = [str(digest) for digest in content["recipes"]]
    return Owner(content["recipe"], content["model"], artifacts, recipes)


def _owner_without_marker(path: Path) -> Owner | None:
    if not (path / ".qwlora" / "stages.json").is_file():
        return None
    try:
        content = load_yaml((path / "recipe.yaml").read_text(encoding="utf-8"))
        return Owner(str(content["name"]), str(content["model"]["source"]))
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError) as error:
        raise DirectoryError(
            f"{str(path / 'recipe.yaml')!r} cannot be read, so it is unknown which job "
            f"{str(path)!r} belongs to. Restore it, or choose another --out."
        ) from error
