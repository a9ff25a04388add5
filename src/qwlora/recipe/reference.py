"""Generates docs/recipe.md, the recipe reference, from the recipe's fields.

`make docs/recipe.md` writes it.
"""

from __future__ import annotations

import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qwlora.recipe import PRESETS, Recipe

_HEAD = """\
# Recipe reference

Every key of a recipe, with its type, default and meaning. `qwlora init` writes a short recipe to
start from, `qwlora check RECIPE` prints a recipe with all defaults filled in, and
`--set base.weights.bitwidth=3` changes one value for one run. Recipes are YAML 1.2; unknown and
repeated keys are errors.

This page is generated from the code: `make docs/recipe.md`.
"""


def recipe_reference() -> str:
    """The page as Markdown."""
    lines = [_HEAD, "## Presets\n", "| preset | sets |", "|---|---|"]
    for name, preset in PRESETS.items():
        settings = [f"base.{key}" for key in _flat(preset["base"])]
        settings += [f"adapters[].{key}" for key in _flat(preset["adapter"])]
        lines.append(f"| `{name}` | {', '.join(f'`{setting}`' for setting in settings)} |")
    lines.append(
        "\nKeys set in the recipe override the preset. `init: qera` is not applied to adapters with"
    )
    lines.append("`dora` or `continue_from`, nor with `base.solver: keep`.\n")
    lines += _tables("Top level", Recipe, "")
    return "\n".join(lines).rstrip() + "\n"


def _flat(settings: dict[str, Any], path: str = "") -> list[str]:
    found = []
    for key, value in settings.items():
        where = f"{path}{key}"
        found += _flat(value, f"{where}.") if isinstance(value, dict) else [f"{where}: {value}"]
    return found


def _tables(title: str, section: type[BaseModel], path: str) -> list[str]:
    """A table of the section's keys, followed by the tables of its subsections."""
    lines = [f"## {title}\n"]
    if path and section.__doc__:
        lines.append(f"{inspect.cleandoc(section.__doc__)}\n")
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    inner: list[str] = []
    for name, field in section.model_fields.items():
        kind, many = _section_of(field)
        where = f"{path}{name}"
        if kind is not None:
            shown = f"list of [{where}[]](#{_anchor(where + '[]')})" if many else "section"
            inner += _tables(
                f"{where}{'[]' if many else ''}", kind, f"{where}{'[]' if many else ''}."
            )
        else:
            shown = _type(field.annotation)
        default = "by preset" if where == "adapters[].init" else _default(field, kind)
        lines.append(f"| `{name}` | {shown} | {default} | {_escaped(field)} |")
    return [*lines, "", *inner]


def _section_of(field: FieldInfo) -> tuple[type[BaseModel] | None, bool]:
    """The section class of a field (None if it has none), and whether it is a list of sections."""
    kind, many = field.annotation, False
    if get_origin(kind) is list:
        (kind,), many = get_args(kind), True
    elif get_origin(kind) in (Union, types.UnionType):
        of_recipe = {top.annotation for top in Recipe.model_fields.values()}  # has its own table
        some = [k for k in get_args(kind) if k is not types.NoneType and k not in of_recipe]
        kind = some[0] if len(some) == 1 else kind
    is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
    return (kind, many) if is_section else (None, False)  # type: ignore[return-value]


def _type(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " \\| ".join(f"`{value}`" for value in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(k) for k in inner if k is not types.NoneType)
    if origin is list:
        return f"list of {_type(inner[0])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"keys of [{kind.__name__.lower()}](#{kind.__name__.lower()})"
    if origin is dict:
        return f"{_type(inner[0])} to {_type(inner[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "`true` \\| `false`"}
    return names[kind]


def _default(field: FieldInfo, section: type[BaseModel] | None) -> str:
    if field.is_required():
        return "required"
    if field.default is None or (section is not None and field.default != []):
        return ""
    value = yaml.safe_dump(field.default, default_flow_style=True).strip()
    return f"`{value.removesuffix('...').strip()}`"


def _escaped(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")


def _anchor(title: str) -> str:
    return "".join(c for c in title.lower() if c.isalnum() or c in "_-")


if __name__ == "__main__":
    print(recipe_reference(), end="")
