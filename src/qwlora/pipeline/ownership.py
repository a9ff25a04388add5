"""What a job made in its directory, and therefore may replace.

`.qwlora/owner.json` is written when the directory is made, before anything else, and names

    the job:             the recipe's name and model
    its artifacts:       each folder with the files that the job put there
    its `recipe.yaml`:   SHA-256 of the versions that the job wrote

A directory without this marker is not ours. Older versions wrote no marker; their jobs are
recognized by `.qwlora/stages.json`, and get a marker when they are next run.
"""

from __future__ import annotations

import json
import os
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
    """The content of a marker.

    Args:
        artifacts: folder, relative to the job's directory, to the files in it, relative to it.
        recipes: SHA-256 of the last two versions of `recipe.yaml` that the job wrote. Two, since
            a kill can leave the older one in place.
    """

    recipe: str
    model: str
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    recipes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        return strict_json.dumps({"format": OWNER_FORMAT, **asdict(self)}, indent=1) + "\n"


def read_owner(path: Path) -> Owner | None:
    """Who made the job directory `path`; None if no job did.

    Raises:
        DirectoryError: the marker is damaged, or of a newer version; or a job without a marker
            has no readable recipe.
    """
    marker = path / ".qwlora" / "owner.json"
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
        return _parse(content)
    except (FileNotFoundError, NotADirectoryError):
        return _owner_without_marker(path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DirectoryError(
            f"{str(marker)!r} is damaged ({error}). It says that qwlora made this directory. "
            "Restore it; if the directory is a job's, deleting it makes the next run write it anew."
        ) from error


def is_unclaimed(path: Path) -> bool:
    """Whether the existing folder `path` is empty, or was left so by a process that was killed
    before it wrote the marker."""
    inside = set(os.listdir(path))
    private = path / ".qwlora"
    if inside - {private.name}:
        return False
    return not inside or (private.is_dir() and set(os.listdir(private)) <= _BEFORE_MARKER)


def files_in(folder: Path) -> list[str]:
    """Every file under `folder`, relative to it, links included and not followed."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(found)


def check_replaceable(target: Path, known: set[str]) -> None:
    """Check that everything at `target` was made by the job.

    Args:
        known: the files of `target` that the job made.

    Raises:
        DirectoryError: something else is there.
    """
    if not os.path.lexists(target):
        return
    is_folder = target.is_dir() and not target.is_symlink()
    foreign = [name for name in files_in(target) if name not in known] if is_folder else []
    if is_folder and not foreign:
        return
    what = (
        f"{str(target)!r} holds {foreign[0]!r}"
        + (f" and {len(foreign) - 1} more files" if len(foreign) > 1 else "")
        if is_folder
        else f"{str(target)!r} exists and is no folder"
    )
    raise DirectoryError(
        f"{what}, not made by this job according to its records; the job would replace it. "
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
            f"{str(path / 'recipe.yaml')!r} cannot be read, so the job that {str(path)!r} belongs "
            "to is not known. Restore it, or choose another --out."
        ) from error
