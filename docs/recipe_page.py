"""docs/recipe.md: the sections of a recipe and their keys, from the recipe's JSON schema.

python docs/recipe_page.py     prints the page; a test compares
"""

from __future__ import annotations

import re
from typing import Any

from qwlora.recipe import Recipe
from qwlora.recipe.yaml_core import flow

HEAD = """\
# Recipe reference

`qwlora init` writes a short recipe. `qwlora check RECIPE --full` prints yours with all defaults.
`--set base.weights=w3-block32` changes one value for one run. Recipes are YAML 1.2. Paths are
relative to the recipe's folder; `--out` is relative to the current directory. Defaults are bold.
"""


def page() -> str:
    """The whole page: a list for each section of the JSON schema."""
    schema = Recipe.model_json_schema()
    text = HEAD
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        text += f"\n## {name}\n\n{section['description']}\n\n"
        for key, field in section["properties"].items():
            values = _values(field, "by preset" if key == "init" else field.get("default"))
            if key in section.get("required", ()):
                values += ", required"
            meaning = " ".join(field.get("description", "").split()).replace("*", "\\*")
            text += f"- `{key}`{_joined(values, meaning)}\n"
    return text


def _joined(values: str, meaning: str) -> str:
    """The values in parentheses, or marked where `meaning` names each of them."""
    marked = meaning
    for value in values.split(", "):
        name = re.escape(value.strip("*`"))
        marked, count = re.subn(rf"(?<!\S){name}: ", f"{value}: ", marked, count=1)
        if not (count and "`" in value):
            return f" ({values}){': ' if meaning else ''}{meaning}"
    return f": {marked}"


def _values(field: dict[str, Any], default: Any = None) -> str:
    """The values that a key can have, with the default in bold."""
    bold = f"**`{flow(default)}`**"
    match field:
        case {"enum": values}:
            return ", ".join(bold if v == default else f"`{flow(v)}`" for v in values)
        case {"type": "boolean" | "integer" | "number"} if default is not None:
            return bold
        case {"const": value}:
            return f"`{value}`"
        case {"$ref": str(reference)}:
            name = reference.rpartition("/")[2]
            return f"[{name}](#{name.lower()})"
        case {"anyOf": kinds}:
            values = " or ".join(_values(kind) for kind in kinds if kind != {"type": "null"})
        case {"items": kind}:
            values = f"list of {_values(kind)}{'s' if kind.get('type') == 'integer' else ''}"
        case {"additionalProperties": dict(kind)}:
            values = f"text to {_values(kind)}"
        case {"type": kind}:
            values = {"string": "text", "boolean": "true or false"}.get(kind, str(kind))
        case _:
            raise AssertionError(f"no name for the type {field}")
    return f"{values}, {bold}" if default else values


if __name__ == "__main__":
    print(page(), end="")
