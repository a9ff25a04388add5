"""The keys of a recipe as text: what `qwlora init` writes, and docs/recipe.md.

starter_recipe()      starter.yaml: the settings most people change
full_recipe()         every key with its description; those with a default are commented out
recipe_reference()    docs/recipe.md, which `make docs/recipe.md` writes
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from pydantic import BaseModel

from qwlora.recipe import PRESETS, Adapter, Recipe
from qwlora.recipe.yaml_core import flow

_FULL = """\
# A QWLoRA recipe with every option. Run it with: qwlora run THIS_FILE --out out
# Commented lines show defaults; uncomment a line to change it.
"""
_SET = {  # the keys without a default, and their sections
    **dict.fromkeys(("model", "data", "adapters")),
    **{"model.source": "path/to/model", "data.source": "path/to/text", "adapters.name": "first"},
}
_PAGE = """\
# Recipe reference

`qwlora init` writes a short recipe to start from, `qwlora check RECIPE --full` prints yours with
all defaults, and `--set base.weights=w3-block32` changes one value for one run. Recipes are YAML
1.2. Paths, also those of `--set`, are relative to the recipe's folder; `--out` is relative to the
current directory. Defaults are bold.
"""


def starter_recipe() -> str:
    """A short recipe: two sources to fill in, and the settings that most people change."""
    return files("qwlora.recipe").joinpath("starter.yaml").read_text(encoding="utf-8")


def full_recipe() -> str:
    """Every key with its description: required keys with placeholders, the rest commented out."""
    lines = "\n".join(_keys(Recipe, "", ""))
    return f"{_FULL}{lines}\n".replace("    name: first", "  - name: first")


def _keys(section: type[BaseModel], path: str, indent: str) -> Iterator[str]:
    """The lines of a section. `path` ends in a period, unless it is empty."""
    preset = PRESETS[Recipe.model_fields["preset"].default]["adapter"]
    for name, field in section.model_fields.items():
        key, comment = f"{path}{name}", ""
        kind = Adapter if key == "adapters" else field.annotation
        if field.description:
            comment = f"  # {' '.join(field.description.split())}"
        mark = "" if key in _SET else "# "
        if not path:
            yield ""
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield f"{mark}{indent}{name}:{comment}"
            yield from _keys(kind, f"{key}.", "    " if key == "adapters" else f"{indent}  ")
        else:
            default = (preset if path == "adapters." else {}).get(name, field.default)
            yield f"{mark}{indent}{name}: {_SET.get(key) or flow(default)}{comment}"


def recipe_reference() -> str:
    """The page as Markdown: a list for each section of the JSON schema."""
    schema = Recipe.model_json_schema()
    page = _PAGE
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        page += f"\n## {name}\n\n{section['description']}\n\n"
        for key, field in section["properties"].items():
            values = _values(field, "by preset" if key == "init" else field.get("default"))
            if key in section.get("required", ()):
                values += ", required"
            meaning = " ".join(field.get("description", "").split()).replace("*", "\\*")
            page += f"- `{key}`{_joined(values, meaning)}\n"
    return page


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
        case {"type": "boolean"}:
            return _values({"enum": [True, False]}, default)
        case {"type": "integer" | "number"} if default is not None:
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
            values = "text" if kind == "string" else str(kind)
        case _:
            raise AssertionError(f"no name for the type {field}")
    return f"{values}, {bold}" if default else values


if __name__ == "__main__":
    print(recipe_reference(), end="")
