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
from qwlora.errors import RecipeError, SourceError, suggestion
from qwlora.formats.user_path import does_not_exist, source_path, user_path
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
    problems += _check_sources(content)
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
            section: Any = Recipe
            for key in item["loc"][:-1]:
                if isinstance(key, str):  # others number the items of a list
                    section = section.model_fields[key].annotation
                    section = next(iter(get_args(section)), section)
            known = list(section.model_fields)
            yield f"{where}: unknown key{suggestion(str(item['loc'][-1]), known)}"
        elif item["type"] == "missing":
            yield f"{where}: required, but not set"
        else:
            value, is_ours = item.get("input"), item["type"] == "value_error"
            is_whole = isinstance(value, dict | list | BaseModel)
            text = "" if is_ours or is_whole else f" (given: {value!r})"
            yield f"{where or 'recipe'}: {item['msg'].removeprefix('Value error, ')}{text}"


def _sources(
    content: dict[str, Any],
) -> Iterator[tuple[str, dict[str, Any], str, Callable[[str], Any]]]:
    """Every place of a recipe that may name a file: where it is, the mapping and the key that hold
    it, and a function that raises SourceError for a value that names nothing. Loads nothing."""
    from qwlora.data import locate_documents
    from qwlora.formats.model_source import locate

    adapters = content.get("adapters")
    adapters = [a for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []
    names = {name for a in adapters if isinstance(name := a.get("name"), str)}

    def check_adapter(source: str) -> None:
        is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source)
        path = source_path(source)
        if not is_hub_id and not path.exists():
            raise SourceError(
                f"adapter {source!r} {does_not_exist(source, path)}. Give the name of an adapter "
                "in this recipe, a folder with adapter_config.json, package:NAME/PATH for a "
                "folder inside an installed package, or a hub id"
            )

    def check_template(source: str) -> None:
        read_text(_file(source, "a file with a Jinja template"))

    of_adapter: dict[str, Callable[[str], Any]] = {"continue_from": check_adapter}
    data: dict[str, Callable[[str], Any]]
    data = {"source": locate_documents, "chat_template": check_template}
    model = {
        "source": locate,
        "encodings": lambda source: _file(source, "the .encodings or .json file that AIMET wrote"),
    }
    sections: list[tuple[str, Any, dict[str, Callable[[str], Any]]]] = [
        ("model", content.get("model"), model),
        ("data", content.get("data"), data),
        *((f"adapters.{i}.data", a.get("data"), data) for i, a in enumerate(adapters)),
        *((f"adapters.{i}", a, of_adapter) for i, a in enumerate(adapters)),
    ]
    for where, part, checks in sections:
        for key, check in checks.items() if isinstance(part, dict) else ():
            is_name = key == "continue_from" and part.get(key) in names  # of this recipe
            if isinstance(part.get(key), str) and not is_name:
                yield f"{where}.{key}", part, key, check


def _file(source: str, wanted: str) -> Path:
    path = user_path(source)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else does_not_exist(source, path)
        raise SourceError(f"{source!r} {what}. Give {wanted}")
    return path


def _check_sources(content: dict[str, Any]) -> list[str]:
    """Problems with sources that do not exist. Makes paths in `content` absolute, so that the
    resolved recipe does not depend on the current directory."""
    problems = []
    for where, part, key, check in list(_sources(content)):
        try:
            check(part[key])
            path = user_path(part[key])
            if key in ("encodings", "chat_template") or path.exists():
                part[key] = str(path.absolute())
        except SourceError as error:
            problems.append(f"{where}: {error}")
    return problems
