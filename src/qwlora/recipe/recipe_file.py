"""Read a recipe file, apply `--set` changes and validate it. Reports all problems at once."""

from __future__ import annotations

import copy
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from qwlora.data.rows import read_text
from qwlora.errors import DirectoryError, RecipeError, SourceError, suggestion
from qwlora.formats.model_source import relative_to
from qwlora.recipe.whole_recipe import Recipe
from qwlora.recipe.yaml_core import load_yaml


def load_recipe(path: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, or that of a job, apply `changes` and validate the result. Relative paths in
    both are relative to the recipe's folder.

    Args:
        changes: `section.key=value`, where value is YAML and a number selects an item of a list:
            `adapters.0.steps=5`.

    Raises:
        DirectoryError: there is no such file.
        RecipeError: lists every problem found.
    """
    if path.is_dir():
        path = path / "recipe.yaml"
    source = str(path)
    if not os.path.lexists(path):
        raise DirectoryError(
            f"there is no recipe {source!r}. Give a recipe or a job's directory, or write a new "
            f"recipe: {shlex.join(['qwlora', 'init', source])}"
        )
    try:
        content = load_yaml(read_text(path))
    except yaml.YAMLError as error:
        raise RecipeError(source, [str(error)]) from error
    except SourceError as error:
        raise RecipeError(source, [str(error)]) from error
    if not isinstance(content, dict):
        raise RecipeError(
            source, ["is not a mapping of sections; `qwlora init` writes a recipe to start from"]
        )
    with relative_to(path.parent):
        return parse_recipe(content, source, changes)


def parse_recipe(recipe: Mapping[str, Any], source: str, changes: tuple[str, ...] = ()) -> Recipe:
    """A recipe from its content; `source` is the file that messages name. See `load_recipe`."""
    content = copy.deepcopy(dict(recipe))
    problems = [p for change in changes if (p := _change(content, change))]
    try:
        checked = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(source, [*problems, *_describe(error)]) from error
    if problems:
        raise RecipeError(source, problems)
    return checked


def _change(content: dict[str, Any], change: str) -> str | None:
    path, equals, value = change.partition("=")
    if not equals or not path:
        return f"--set {change}: expected KEY=VALUE, for example base.weights=w3-block32"
    *parents, last = path.split(".")
    node: Any = content
    try:
        for key in parents:
            # A job's own recipe has every key, and null for a section that is not set.
            if isinstance(node, dict) and node.get(key) is None:
                node[key] = {}
            node = node[_place(node, key)]
        if not isinstance(node, dict | list):
            return f"--set {change}: {'.'.join(parents)} is a single value, not a section"
        node[_place(node, last)] = load_yaml(value)
    except (ValueError, IndexError, TypeError):
        return (
            f"--set {change}: the recipe has no {path}. Members of a list have numbers from 0, "
            "adapters also names: adapters.0.rank=8, adapters.NAME.rank=8"
        )
    except yaml.YAMLError as error:
        return f"--set {change}: the value is not YAML: {error}"
    return None


def _place(node: Any, key: str) -> Any:
    if not isinstance(node, list):
        return key
    names = [member.get("name") if isinstance(member, dict) else None for member in node]
    return names.index(key) if key in names else int(key)


def _describe(error: ValidationError) -> Iterator[str]:
    of_data = set[tuple[str, str]]()
    for item in error.errors():
        *sections, key = item["loc"] or ("",)
        where = ".".join(map(str, (*sections, key)))
        if sections == ["data"]:
            of_data.add((str(key), item["msg"]))
        # The adapter has this value from the data section, where it is reported.
        elif sections[2:] == ["data"] and (str(key), item["msg"]) in of_data:
            continue
        if item["type"] == "extra_forbidden":
            section: Any = Recipe
            for part in sections:
                # Numbers are of items in a list, which have the section of the list.
                if isinstance(part, str):
                    section = section.model_fields[part].annotation
                    section = next(iter(get_args(section)), section)
            yield f"{where}: unknown key{suggestion(str(key), list(section.model_fields))}"
        elif item["type"] == "missing":
            yield f"{where}: required, but not set"
        elif item["type"] == "value_error":
            reason = item["ctx"]["error"]
            problems = reason.problems if isinstance(reason, RecipeError) else [reason]
            yield from (f"{where}: {p}" if where else p for p in problems)
        else:
            value = item["input"]
            text = "" if isinstance(value, dict | list) else f" (given: {value!r})"
            yield f"{where}: {item['msg']}{text}"
