"""The keys of a recipe as text: what `qwlora init` writes, and docs/recipe.md.

starter_recipe()      starter.yaml: the settings most people change
full_recipe()         every key with its description; those with a default are commented out
recipe_reference()    docs/recipe.md, which `make docs/recipe.md` writes
"""

from __future__ import annotations

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
1.2; unknown and repeated keys are errors. Relative paths, also those of `--set`, are relative to
the folder of the recipe; `--out` is relative to the current directory. Written from the code:
`make docs/recipe.md`.

## Presets

| preset | sets |
|---|---|
"""
_BELOW_PRESETS = """
Keys set in the recipe override the preset. `init: qera` is not applied to adapters with
`dora` or `continue_from`, nor with `base.solver: keep`.
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
    """The page as Markdown: the presets, and a table for each section of the JSON schema."""
    schema = Recipe.model_json_schema()
    page = _PAGE + "".join(f"| `{name}` | `{flow(sets)}` |\n" for name, sets in PRESETS.items())
    page += _BELOW_PRESETS
    for name, section in {"Recipe": schema, **schema["$defs"]}.items():
        page += f"\n## {name}\n\n{section['description']}\n\n"
        page += "| key | type | default | meaning |\n|---|---|---|---|\n"
        for key, field in section["properties"].items():
            kind, default = _type(field), field.get("default")
            shown = "required" if key in section.get("required", ()) else ""
            if key == "init":
                shown = "by preset"
            elif default is not None and "$ref" not in field:
                shown = f"`{flow(default)}`"
            meaning = " ".join(field.get("description", "").split()).replace("|", "\\|")
            page += f"| `{key}` | {kind} | {shown} | {meaning} |\n"
    return page


def _type(field: dict[str, Any]) -> str:
    match field:
        case {"anyOf": kinds}:
            return " or ".join(_type(kind) for kind in kinds if kind != {"type": "null"})
        case {"$ref": str(reference)}:
            name = reference.rpartition("/")[2]
            return f"[{name}](#{name.lower()})"
        case {"enum": values}:
            return ", ".join(f"`{value}`" for value in values)
        case {"const": value}:
            return f"`{value}`"
        case {"items": kind}:
            return f"list of {_type(kind)}"
        case {"additionalProperties": dict(kind)}:
            return f"text to {_type(kind)}"
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"type": kind}:
            return "text" if kind == "string" else str(kind)
    raise AssertionError(f"no name for the type {field}")


if __name__ == "__main__":
    print(recipe_reference(), end="")
