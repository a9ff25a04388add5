"""Generates docs/recipe.md, the recipe reference, from the JSON schema of the recipe.

`make docs/recipe.md` writes it.
"""

from __future__ import annotations

from typing import Any

from qwlora.recipe import PRESETS, Recipe
from qwlora.recipe.yaml_core import flow

_HEAD = """\
# Recipe reference

Every key of a recipe, with its type, default and meaning. `qwlora init` writes a short recipe to
start from, `qwlora check RECIPE` prints a recipe with all defaults filled in, and
`--set base.weights.bitwidth=3` changes one value for one run. Recipes are YAML 1.2; unknown and
repeated keys are errors.

This page is generated from the code: `make docs/recipe.md`.

## Presets

| preset | sets |
|---|---|
"""
_BELOW_PRESETS = """
Keys set in the recipe override the preset. `init: qera` is not applied to adapters with
`dora` or `continue_from`, nor with `base.solver: keep`.
"""
_TYPES = {"string": "text", "integer": "integer", "number": "number"}


def recipe_reference() -> str:
    """The page as Markdown."""
    schema = Recipe.model_json_schema()
    presets = "".join(
        f"| `{name}` | {', '.join(f'`{line}`' for line in _flat(preset))} |\n"
        for name, preset in PRESETS.items()
    )
    lines = [_HEAD + presets + _BELOW_PRESETS, *_section("Top level", "", schema, schema["$defs"])]
    return "\n".join(lines).rstrip() + "\n"


def _flat(preset: dict[str, Any], path: str = "") -> list[str]:
    lines = []
    for key, value in preset.items():
        where = f"{path}{'adapters[]' if key == 'adapter' else key}"
        lines += _flat(value, f"{where}.") if isinstance(value, dict) else [f"{where}: {value}"]
    return lines


def _section(title: str, path: str, section: dict[str, Any], every: dict[str, Any]) -> list[str]:
    """A table of a section's keys, followed by the tables of its subsections."""
    about = [section["description"], ""] if path else []
    rows, inner = ["| key | type | default | meaning |", "|---|---|---|---|"], list[str]()
    for name, field in section["properties"].items():
        where, kind = f"{path}{name}", _inner(field)
        if path and kind == "Data":  # has its own table
            kind = None
        many = field.get("type") == "array"
        if kind is not None:
            title_of = f"{where}[]" if many else where
            inner += _section(title_of, f"{title_of}.", every[kind], every)
            anchor = "".join(c for c in title_of if c.isalnum() or c == "_")
            shown = f"list of [{title_of}](#{anchor})" if many else "section"
        else:
            shown = _type(field, every)
        default = field.get("default")
        value = "required" if name in section.get("required", ()) else ""
        if where == "adapters[].init":
            value = "by preset"
        elif default is not None and not (kind and not many):
            value = f"`{flow(default)}`"
        meaning = field.get("description", "").replace("|", "\\|")
        rows.append(f"| `{name}` | {shown} | {value} | {meaning} |")
    return [f"## {title}\n", *about, *rows, "", *inner]


def _inner(field: dict[str, Any]) -> str | None:
    """The name of the section that a field holds, in a list or instead of null; None if none."""
    kinds = [k for k in field.get("anyOf", [field]) if k.get("type") != "null"]
    kind = kinds[0].get("items", kinds[0]) if len(kinds) == 1 else {}
    reference = kind.get("$ref")
    return None if reference is None else str(reference.rpartition("/")[2])


def _type(field: dict[str, Any], every: dict[str, Any]) -> str:
    if kinds := field.get("anyOf"):
        return " or ".join(_type(kind, every) for kind in kinds if kind.get("type") != "null")
    if reference := field.get("$ref"):
        name = reference.rpartition("/")[2]
        return f"keys of [{name.lower()}](#{name.lower()})"
    if values := field.get("enum", [field["const"]] if "const" in field else None):
        return " \\| ".join(f"`{value}`" for value in values)
    match field.get("type"):
        case "array":
            return f"list of {_type(field['items'], every)}"
        case "object":
            return f"text to {_type(field['additionalProperties'], every)}"
        case "boolean":
            return "`true` \\| `false`"
        case kind:
            return _TYPES[str(kind)]


if __name__ == "__main__":
    print(recipe_reference(), end="")
