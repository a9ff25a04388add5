"""Read a recipe file, apply `--set` changes and validate it. Reports all problems at once."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qwlora.data.text_files import read_text
from qwlora.errors import RecipeError, SourceError
from qwlora.formats.user_path import does_not_exist, source_path, user_path
from qwlora.messages import suggestion
from qwlora.recipe.whole_recipe import Recipe
from qwlora.recipe.yaml_core import load_yaml


def load_recipe(path: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, apply `changes` and validate the result.

    Args:
        changes: `section.key=value`, where value is YAML and a number selects an item of a list:
            `adapters.0.steps=5`.

    Raises:
        RecipeError: lists every problem found.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(source, [f"line {line} is not UTF-8 text; convert the file"]) from error
    except (OSError, ValueError) as error:
        raise RecipeError(
            source, [f"cannot be read: {getattr(error, 'strerror', None) or error}"]
        ) from error
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(source, [f"is not YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise RecipeError(
            source, ["is not a mapping of sections; `qwlora init` writes a recipe to start from"]
        )
    return parse_recipe(content, source, changes)


def parse_recipe(given: Mapping[str, Any], source: str, changes: tuple[str, ...] = ()) -> Recipe:
    """A recipe from its content; `source` is the file that messages name. See `load_recipe`."""
    content = copy.deepcopy(dict(given))
    problems = [p for change in changes if (p := _change(content, change))]
    problems += _missing_sources(content)
    _make_paths_absolute(content)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(source, [*problems, *_describe(error)]) from error
    if problems:
        raise RecipeError(source, problems)
    return recipe


def _change(content: dict[str, Any], change: str) -> str | None:
    """Apply one `a.b.c=value` in place; returns the problem, if there is one."""
    path, equals, value = change.partition("=")
    if not equals or not path:
        return f"--set {change}: expected KEY=VALUE, for example base.weights.bitwidth=3"
    *parents, last = path.split(".")
    node: Any = content
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = load_yaml(value)
        elif isinstance(node, dict):
            node[last] = load_yaml(value)
        else:
            return f"--set {change}: {'.'.join(parents)} is a single value, not a section"
    except (ValueError, IndexError, AttributeError):
        return f"--set {change}: the recipe has no {path}"
    except yaml.YAMLError as error:
        return f"--set {change}: the value is not YAML: {error}"
    return None


def _describe(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            valid = _keys_at(item["loc"][:-1])
            yield f"{where}: unknown key{suggestion(str(item['loc'][-1]), valid)}"
        elif item["type"] == "missing":
            yield f"{where}: required, but not set"
        else:
            yield f"{where or 'recipe'}: {item['msg'].removeprefix('Value error, ')}" + _given(item)


def _given(item: Any) -> str:
    value = item.get("input")
    return (
        ""
        if isinstance(value, dict | list | BaseModel) or item["type"] == "value_error"
        else f" (given: {value!r})"
    )


def _keys_at(location: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at `location`; numbers in it are list indices."""
    section: Any = Recipe
    for key in location:
        if isinstance(key, str):
            section = section.model_fields[key].annotation
            section = next(iter(get_args(section)), section)
    return list(section.model_fields)


def _make_paths_absolute(content: dict[str, Any]) -> None:
    """Make relative paths in `content` absolute, so that the resolved recipe does not depend on the
    current directory. Values that are not valid paths stay unchanged.
    """
    for _, part, key, _ in _named_files(content):
        path = _path_of(part.get(key))
        if path is not None and (key != "source" or path.exists()):
            part[key] = str(path.absolute())
    names = _names(content)
    for adapter in _adapters(content):
        path = _path_of(adapter.get("continue_from"))
        if path is not None and adapter["continue_from"] not in names and path.exists():
            adapter["continue_from"] = str(path.absolute())


def _named_files(
    content: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any], str, Callable[[str], Any]]]:
    """Every place of a recipe that may name a file: the section's key and mapping, the key in it,
    and a function that raises SourceError for a value that names nothing."""
    from qwlora.data import locate_documents
    from qwlora.formats.model_source import locate

    data = {"source": locate_documents, "chat_template": _check_template}
    sections: list[tuple[str, Any, dict[str, Callable[[str], Any]]]] = [
        ("model", content.get("model"), {"source": locate, "encodings": _check_encodings}),
        ("data", content.get("data"), data),
        *((f"adapters.{i}.data", a.get("data"), data) for i, a in enumerate(_adapters(content))),
    ]
    for where, part, checks in sections:
        if isinstance(part, dict):
            for key, check in checks.items():
                yield where, part, key, check


def _path_of(value: Any) -> Path | None:
    """`value` as a path; None if it cannot be one."""
    try:
        return user_path(value) if isinstance(value, str) else None
    except SourceError:
        return None


def _adapters(content: dict[str, Any]) -> list[dict[str, Any]]:
    adapters = content.get("adapters")
    return [a for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []


def _names(content: dict[str, Any]) -> set[str]:
    return {name for a in _adapters(content) if isinstance(name := a.get("name"), str)}


def _missing_sources(content: dict[str, Any]) -> list[str]:
    """Problems with sources that do not exist: model, encodings, data, template, adapters.

    Loads nothing.
    """
    names = _names(content)

    def check_adapter(source: str) -> None:
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)
        path = source_path(source)
        if source not in names and not is_hub_id and not path.exists():
            raise SourceError(
                f"adapter {source!r} {does_not_exist(source, path)}. Give the name of an adapter "
                "in this recipe, a folder with adapter_config.json, package:NAME/PATH for a "
                "folder inside an installed package, or a hub id"
            )

    values: list[tuple[str, Any, Callable[[str], Any]]] = [
        (f"{where}.{key}", part.get(key), check)
        for where, part, key, check in _named_files(content)
    ]
    values += [
        (f"adapters.{i}.continue_from", a.get("continue_from"), check_adapter)
        for i, a in enumerate(_adapters(content))
    ]
    problems = []
    for where, value, check in values:
        try:
            if isinstance(value, str):
                check(value)
        except SourceError as error:
            problems.append(f"{where}: {error}")
    return problems


def _check_encodings(encodings: str) -> None:
    path = user_path(encodings)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else does_not_exist(encodings, path)
        raise SourceError(
            f"{encodings!r} {what}. Give the .encodings or .json file that AIMET wrote"
        )


def _check_template(template: str) -> None:
    path = user_path(template)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else does_not_exist(template, path)
        raise SourceError(f"{template!r} {what}. Give a file with a Jinja template")
    read_text(path)
