"""A recipe's file: read, changed by `--set`, and validated; every problem at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from qwlora.errors import RecipeError, SourceError
from qwlora.recipe.whole_recipe import Recipe


def load_recipe(path: Path, changes: tuple[str, ...] = ()) -> Recipe:
    """Read, change and validate a recipe.

    Args:
        changes: `section.key=value`, the value in YAML; `adapters.0.steps=5` reaches into a list.

    Raises:
        RecipeError: with every problem found.
    """
    source = str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            source, [f"cannot be read: {getattr(error, 'strerror', None) or error}"]
        ) from error
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(source, [f"is not YAML: {error}"]) from error
    if not isinstance(content, dict):
        raise RecipeError(
            source, ["is not a mapping of sections; `qwlora init` writes one to start from"]
        )
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


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 5e-4 for a string; everybody else for a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _change(content: dict[str, Any], change: str) -> str | None:
    """Apply one `a.b.c=value`; returns what is wrong with it, if anything."""
    path, equals, value = change.partition("=")
    if not equals or not path:
        return f"--set {change}: write it like base.weights.bitwidth=3"
    *parents, last = path.split(".")
    node: Any = content
    try:
        for key in parents:
            node = node[int(key)] if isinstance(node, list) else node.setdefault(key, {})
        if isinstance(node, list):
            node[int(last)] = yaml.load(value, Loader=_Loader)
        elif isinstance(node, dict):
            node[last] = yaml.load(value, Loader=_Loader)
        else:
            return f"--set {change}: {'.'.join(parents)} is a value, not a section"
    except (ValueError, IndexError, AttributeError):
        return f"--set {change}: nothing is at {path}"
    except yaml.YAMLError:
        return f"--set {change}: {value} is not YAML"
    return None


def _describe(error: ValidationError) -> Iterator[str]:
    for item in error.errors():
        where = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            valid = _keys_at(item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), valid, n=1, cutoff=0.5)
            yield f"{where}: unknown key" + (
                f"; did you mean {near[0]}?" if near else f"; known are {', '.join(valid)}"
            )
        elif item["type"] == "missing":
            yield f"{where}: required and not given"
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
    """Valid keys of the section at `location`; a number there is a place in a list."""
    section: Any = Recipe
    for key in location:
        if isinstance(key, str):
            section = section.model_fields[key].annotation
            section = next(iter(get_args(section)), section)
    return list(section.model_fields)


def _make_paths_absolute(content: dict[str, Any]) -> None:
    """Sources that are paths are relative to the current directory; the resolved recipe must not be."""
    for part in (content.get("model"), content.get("data")):
        if (
            isinstance(part, dict)
            and isinstance(source := part.get("source"), str)
            and Path(source).expanduser().exists()
        ):
            part["source"] = str(Path(source).expanduser().absolute())
    model = content.get("model")
    if isinstance(model, dict) and isinstance(encodings := model.get("encodings"), str):
        model["encodings"] = str(Path(encodings).expanduser().absolute())
    data = content.get("data")
    if isinstance(data, dict) and isinstance(template := data.get("chat_template"), str):
        data["chat_template"] = str(Path(template).expanduser().absolute())
    names = {adapter.get("name") for adapter in _adapters(content)}
    for adapter in _adapters(content):
        if (
            isinstance(start := adapter.get("start"), str)
            and start not in names
            and Path(start).expanduser().exists()
        ):
            adapter["start"] = str(Path(start).expanduser().absolute())


def _adapters(content: dict[str, Any]) -> list[dict[str, Any]]:
    adapters = content.get("adapters")
    return [a for a in adapters if isinstance(a, dict)] if isinstance(adapters, list) else []


def _missing_sources(content: dict[str, Any]) -> list[str]:
    """Model, encodings, data and starts that are not where the recipe says, as far as can be seen without loading them."""
    from qwlora.data import locate_documents
    from qwlora.formats.model_source import locate

    problems = []
    for section, look in (("model", locate), ("data", locate_documents)):
        part = content.get(section)
        source = part.get("source") if isinstance(part, dict) else None
        if isinstance(source, str):
            try:
                look(source)
            except SourceError as error:
                problems.append(f"{section}.source: {error}")
        template = part.get("chat_template") if isinstance(part, dict) else None
        if isinstance(template, str) and not Path(template).expanduser().is_file():
            problems.append(f"{section}.chat_template: {template!r} is not a file")
        encodings = part.get("encodings") if isinstance(part, dict) else None
        if isinstance(encodings, str) and not (path := Path(encodings).expanduser()).is_file():
            what = "is a folder" if path.is_dir() else "does not exist"
            problems.append(
                f"{section}.encodings: {encodings!r} {what}. Give the .encodings or .json file that AIMET wrote"
            )
    names = {adapter.get("name") for adapter in _adapters(content)}
    for i, adapter in enumerate(_adapters(content)):
        start = adapter.get("start")
        if (
            isinstance(start, str)
            and start not in names
            and not Path(start).expanduser().exists()
            and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", start)
        ):
            problems.append(
                f"adapters.{i}.start: adapter {start!r} does not exist. Give another's name, a folder with adapter_config.json, or a hub id"
            )
    return problems
