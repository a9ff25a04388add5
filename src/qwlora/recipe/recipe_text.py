"""The text of recipe.yaml in a job."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from qwlora.errors import DirectoryError, RecipeError
from qwlora.formats.model_source import relative_to
from qwlora.recipe.recipe_file import parse_recipe
from qwlora.recipe.section import of_a_job
from qwlora.recipe.whole_recipe import Recipe
from qwlora.recipe.yaml_core import dump_yaml, load_yaml

_RULES_HEAD = """\
# What base.bits or base.size chose. To reuse it, or after you edited it, put these rules into a
# recipe in place of bits or size. The first matching rule decides.
"""


def written(recipe: Recipe, file: Path | None, path: Path) -> str:
    """The text of a new job's `path`: that of the user's `file`, with absolute paths and with what
    else `recipe` changes; without a file, or if it cannot be edited, the keys that are set."""
    with suppress(DirectoryError, OSError, UnicodeDecodeError):
        if file is not None:
            text = file.read_text(encoding="utf-8-sig")
            return edited(text, load_yaml(text), recipe, path)
    return dump_yaml(_movable(recipe, f"{path.parent.absolute()}/"))


def edited(text: str, before: Recipe | dict[str, Any], after: Recipe, path: Path) -> str:
    """The `text` of file `path`, which reads as `before`, changed so that it reads as `after`."""
    # The file is the user's. ruamel keeps comments and the order of keys, which PyYAML does not.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    yaml = YAML()
    # Wide enough that no line is folded which the user did not fold.
    yaml.width, yaml.preserve_quotes = 10_000, True
    yaml.indent(mapping=2, sequence=2 if "\n- " in text else 4, offset=0 if "\n- " in text else 2)
    # By itself, ruamel 0.19 writes nothing for null.
    null = "tag:yaml.org,2002:null"
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar(null, "null"))
    inside = f"{path.parent.absolute()}/"
    try:
        document = yaml.load(text)
        _change(document, *(_movable(recipe, inside) for recipe in (before, after)))
        yaml.dump(document, stream := io.StringIO())
        # Anchors and merge keys may have changed more than was meant, so it is read again.
        with relative_to(path.parent), of_a_job():
            if parse_recipe(load_yaml(stream.getvalue()), str(path)) == after:
                return stream.getvalue()
        reason = "the changed text would read as another recipe"
    except RecipeError as error:
        reason = str(error)
    except (YAMLError, ValueError, TypeError, KeyError, IndexError):
        reason = "it has YAML that only a person can edit"
    raise DirectoryError(
        f"{str(path)!r} cannot be changed automatically ({reason}). Make the change in it by hand, "
        "then run the job"
    )


def _movable(recipe: Recipe | dict[str, Any], inside: str) -> Any:
    if isinstance(recipe, dict):
        return recipe

    def relative(value: Any) -> Any:
        # Paths inside the job's folder are relative to it, so that the job can be moved.
        if isinstance(value, dict):
            if value.keys() == {"text"}:  # a part of base.calibration
                return relative(value["text"])
            return {key: relative(item) for key, item in value.items()}
        if isinstance(value, list):
            return [relative(item) for item in value]
        is_inside = isinstance(value, str) and value.startswith(inside)
        return f"./{value.removeprefix(inside)}" if is_inside else value

    return relative(recipe.model_dump(mode="json", exclude_unset=True))


def _change(node: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    # Only what differs is touched: all else keeps the user's text.
    for key in before.keys() - after.keys():
        node.pop(key, None)
    for key, value in after.items():
        old = before.get(key)
        if old == value:
            continue
        current = node.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and isinstance(current, dict):
            _change(current, old, value)
        elif _have_names(old) and _have_names(value) and isinstance(current, list):
            _change_list(current, old or [], value)
        else:
            node[key] = value


def _change_list(node: list[Any], before: list[Any], after: list[Any]) -> None:
    if len(after) < len(before):
        names = [member["name"] for member in after]
        # From the end, so that the numbers before stay what they are.
        for number in reversed(range(len(before))):
            if before[number]["name"] not in names:
                del node[number]
        before = [member for member in before if member["name"] in names]
    for number, (old, new) in enumerate(zip(before, after, strict=False)):
        _change(node[number], old, new)
    node += after[len(before) :]


def _have_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(m, dict) and "name" in m for m in value)


def rules_text(rules: list[dict[str, Any]]) -> str:
    """The part of a recipe that holds the rules of a budget of bits."""
    return _RULES_HEAD + dump_yaml({"base": {"rules": rules}})
