"""Whose a job directory and the files in it are.

A directory with `.qwlora/records` belongs to the job whose recipe is there. Files in it are the
job's if a record lists them (`stage_records.py`).
"""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from qwlora.errors import DirectoryError
from qwlora.pipeline.job.stage_records import FOLDER
from qwlora.recipe.yaml_core import load_yaml

# what is in .qwlora/ before a job has written its recipe
_BEFORE_RECIPE = {"lock", "records", "digests.json", ".digests.json.part"}


def read_owner(path: Path) -> tuple[str, str] | None:
    """Recipe name and model of the job in `path`; None if it is not a job directory.

    Raises:
        DirectoryError: its recipe cannot be read.
    """
    if not (path / FOLDER).is_dir() or is_unclaimed(path):
        return None
    try:
        content = load_yaml((path / "recipe.yaml").read_text(encoding="utf-8"))
        return str(content["name"]), str(content["model"]["source"])
    except (OSError, ValueError, yaml.YAMLError, TypeError, KeyError, RecursionError) as error:
        raise DirectoryError(
            f"{str(path / 'recipe.yaml')!r} cannot be read, so it is unknown which job "
            f"{str(path)!r} belongs to. Restore it, or choose another --out."
        ) from error


def is_unclaimed(path: Path) -> bool:
    """Whether the folder `path` is empty, except for what a process leaves that is killed before it
    wrote the recipe."""
    inside, private = set(os.listdir(path)), path / ".qwlora"
    if inside - {private.name, ".recipe.yaml.part"}:
        return False
    if not private.is_dir():
        return not inside
    return set(os.listdir(private)) <= _BEFORE_RECIPE and not any((path / FOLDER).rglob("*.json"))


def files_in(folder: Path) -> list[str]:
    """All files under `folder`, relative to it. Includes links, but does not follow them."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(root, name))]
        found += [os.path.relpath(os.path.join(root, name), folder) for name in (*files, *links)]
    return sorted(found)
