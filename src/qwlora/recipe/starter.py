"""Recipes that `qwlora init` writes, generated from the defaults and descriptions of the fields.

starter_recipe()    the settings most people change, at most 25 lines
full_recipe()       every key; those with a default are commented out
"""

from __future__ import annotations

import textwrap
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qwlora.recipe import PRESETS, Adapter, Recipe
from qwlora.recipe.simulation_section import SimulationSection

_PLACEHOLDERS = {
    "model.source": "path/to/model",
    "data.source": "path/to/text",
    "adapters.name": "first",
}


def starter_recipe() -> str:
    """A short recipe: two sources to fill in, and the settings that most people change."""
    adapter = Adapter.model_fields
    return f"""\
# A QWLoRA recipe. Set the two sources, then run: qwlora run THIS_FILE --out out
# Every option: qwlora init --full, or docs/recipe.md.
name: {Recipe.model_fields["name"].default}
model:
  source: {_PLACEHOLDERS["model.source"]}  # a checkpoint folder, a .gguf file, or a hub id
data:
  source: {_PLACEHOLDERS["data.source"]}  # text, JSONL, CSV, Parquet, a folder of them, a hub id
preset: {Recipe.model_fields["preset"].default}  # {" | ".join(PRESETS)}
base:
  weights: w4-block32  # or w4-channel, w4-lpbq64, w3-block64, w8-channel, ...
adapters:  # one base, many adapters
  - name: {_PLACEHOLDERS["adapters.name"]}
    rank: {adapter["rank"].default}
    steps: {adapter["steps"].default}
simulation:
  activation_bitwidth: {SimulationSection.model_fields["activation_bitwidth"].default}  # 8 or 16
export:
  targets: [onnx]
"""


def full_recipe() -> str:
    """Every key with its description: required keys with placeholders, the rest commented out."""
    head = (
        "# A QWLoRA recipe with every option. Run it with: qwlora run THIS_FILE --out out\n"
        "# Commented lines show defaults; uncomment a line to change it.\n"
    )
    return head + "\n".join(_section(Recipe, "", 0)) + "\n"


def _section(kind: type[BaseModel], path: str, depth: int) -> list[str]:
    lines = []
    for name, field in kind.model_fields.items():
        where = f"{path}.{name}".lstrip(".")
        inner = _inner(field)
        if depth == 0:
            lines.append("")
        if name == "adapters":
            lines += [f"adapters:{_comment(field)}", *_item(_section(Adapter, where, depth + 1))]
        elif inner is not None:
            required = any(f"{where}.{key}" in _PLACEHOLDERS for key in inner.model_fields)
            lines += [f"{'' if required else '# '}{name}:{_comment(field)}"]
            body = textwrap.indent("\n".join(_section(inner, where, depth + 1)), "  ").split("\n")
            lines += body if required else [f"# {line.replace('# ', '', 1)}" for line in body]
        else:
            required = where in _PLACEHOLDERS
            default = _PLACEHOLDERS[where] if required else _usual(where, field)
            value = (
                yaml.safe_dump(default, default_flow_style=True)
                .removesuffix("\n")
                .removesuffix("\n...")
            )
            lines.append(f"{'' if required else '# '}{name}: {value}{_comment(field)}")
    return lines


def _usual(where: str, field: FieldInfo) -> Any:
    """The value of a key that the recipe does not set: the default preset's, else the field's."""
    section, _, key = where.partition(".")
    preset = PRESETS[Recipe.model_fields["preset"].default]
    return preset["adapter"].get(key, field.default) if section == "adapters" else field.default


def _item(lines: list[str]) -> list[str]:
    """The section's lines, indented as the first item of a list."""
    return [f"  - {lines[0]}", *(f"    {line}" for line in lines[1:])]


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    kind: Any = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _comment(field: FieldInfo) -> str:
    return f"  # {field.description}" if field.description else ""
