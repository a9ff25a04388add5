"""Read a recipe file, apply `--set` changes and validate it. Reports all problems at once."""

from __future__ import annotations

import copy
import os
import re
import reprlib
import shlex
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from qwlora.data.rows import read_text
from qwlora.errors import (
    DirectoryError,
    RecipeError,
    SourceError,
    expected,
    listed,
    near_names,
    shortened,
)
from qwlora.formats.model_source import relative_to
from qwlora.recipe.whole_recipe import Recipe
from qwlora.recipe.yaml_core import load_yaml
from qwlora.targets.registry import TARGETS

# What pydantic adds to the path of a value in a union.
_KIND = re.compile(r"str|list\[.*\]|constrained-\w+|function-.*")
_SHORT = reprlib.Repr()  # ends early where aliases of YAML repeat a list a billion times
_SHORT.maxlevel = 1


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
    except (yaml.YAMLError, SourceError) as error:
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
            f"--set {change}: the recipe has no {path}. Address list entries by number, from 0, "
            "and adapters also by name: adapters.0.rank=8, adapters.NAME.rank=8"
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
    lines, of_data = dict[str, list[str]](), set[tuple[str, str]]()
    for item in error.errors():
        # In a union, pydantic adds the kind of value to the keys.
        loc = [k for k in item["loc"] if not (isinstance(k, str) and _KIND.fullmatch(k))]
        *sections, key = loc or [""]
        where, value, kind = ".".join(map(str, loc)), item["input"], item["type"]
        if sections == ["data"]:
            of_data.add((str(key), item["msg"]))
        # The adapter has this value from the data section, where it is reported.
        elif sections[2:] == ["data"] and (str(key), item["msg"]) in of_data:
            continue
        shown = repr(value) if isinstance(value, str) else _SHORT.repr(value)
        found = shortened("null" if value is None else shown, 80)
        problems = [f"expected %s, found {found}"]
        if kind == "extra_forbidden":
            is_section = isinstance(value, dict) and _entry(where) == "adapters[]"
            for name in [f".{k}" for k in value] if is_section else [""]:
                meant = _meant_key(f"adapters[]{name}" if is_section else where)
                lines[f"{where}{name}: unknown key{meant}"] = []
            continue
        if kind == "missing":
            problems = ["required, but not set"]
        elif kind == "string_pattern_mismatch":
            about = _keys()[_generic(where)].partition(". ")[0]
            problems = [f"{found} does not fit this description: {about}"]
        elif kind == "value_error":
            reason = item["ctx"]["error"]
            problems = [*map(str, reason.problems if isinstance(reason, RecipeError) else [reason])]
        meant = _meant_value(where, value, kind, re.findall(r"'([^']+)'", expected(item)))
        for problem in problems:
            line = f"{where}: {problem}{meant}" if where else problem
            lines.setdefault(line, []).append(expected(item))
    for line, wanted in lines.items():
        yield line.replace("%s", " or ".join(wanted), 1)


def _meant_key(where: str) -> str:
    """The end of a message about the unknown key `where`."""
    parent, _, key = where.rpartition(".")
    places = [path.rpartition(".")[::2] for path in _keys()]
    known = [name for section, name in places if section == _generic(parent)]
    same = sorted((path for path in _keys() if path.rpartition(".")[2] == key), key=len)
    entry = key if key in known else _entry(where) or " or ".join(same[:2])
    if not (entry := entry or "".join(near_names(key, known, 1))):
        return f"; there are {listed(known, 20)}"
    # The keys of an adapter's data are those of the data section.
    name = entry.rpartition(".")[2]
    return _did_you_mean(f"{parent}.{name}".strip(".") if name in known else entry, where)


def _meant_value(where: str, value: Any, kind: str, options: list[str]) -> str:
    """The end of a message about a value at `where`, by the type of pydantic's error; `options` are
    the values that it may have."""
    if not isinstance(value, str):
        return ""
    entry, generic, is_other = _entry(value) or "", _generic(where), kind != "value_error"
    if entry.partition(": ")[0] == generic.removesuffix("[]") or (is_other and ": " in entry):
        return _did_you_mean(entry, where)
    if kind == "list_type" and value:
        return _did_you_mean(f"{where}: [{value}]", where)
    if near := near_names(value, options, 1):
        return _did_you_mean(near[0], where)
    names = [n for n in ("source", "name") if is_other and f"{generic}.{n}" in _keys()]
    return _did_you_mean(f"{where}.{names[0]}: {value}", where) if names else ""


def _did_you_mean(entry: str, where: str) -> str:
    own = re.match(r"adapters\.\d+", where)
    entry = entry.replace("adapters[]", own[0] if own else "adapters.0")
    return f". {entry[:-1]}" if entry.endswith(".") else f"; did you mean {entry}?"


def _entry(path: str) -> str | None:
    """What a key or value of another tool is here, as words.yaml says."""
    generic = _generic(path).lower().replace("-", "_")
    return _words().get(generic) or _words().get(generic.rpartition(".")[2])


def meant_setting(option: str) -> str:
    """The end of a message about an option that stands for a key: `; did you mean --set ...?`"""
    meant = _meant_key(option.lstrip("-").replace("-", "_"))
    key = re.fullmatch(r"; did you mean ([^ :?]+)(?:: (\S+))?( or .*)?\?", meant)
    return f"; did you mean --set {key[1]}={key[2] or '...'}?" if key else ""


def target_of(program: str) -> str | None:
    """The target whose files a program runs, by its name or by that of the target."""
    meant = re.fullmatch(r"export\.targets: \[(\w+)\]", _entry(program) or "")
    return program if program in TARGETS else meant[1] if meant else None


@cache
def _words() -> dict[str, str]:
    table = load_yaml(files("qwlora.recipe").joinpath("words.yaml").read_text(encoding="utf-8"))
    return {word: entry for entry, words in table.items() for word in words.split()}


def _generic(path: str) -> str:
    """A path without numbers: `adapters[].rank` for `adapters.0.rank`."""
    return re.sub(r"\.\d+(?=\.|$)", "[]", path)


@cache
def _keys(section: type[BaseModel] = Recipe, start: str = "") -> dict[str, str]:
    """The paths of all keys, `adapters[].data.source`, and what they mean."""
    paths = dict[str, str]()
    for name, field in section.model_fields.items():
        paths[f"{start}{name}"] = " ".join((field.description or "").split())
        kind = next(iter(get_args(field.annotation)), field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            many = "[]" if get_origin(field.annotation) is list else ""
            paths |= _keys(kind, f"{start}{name}{many}.")
    return paths
