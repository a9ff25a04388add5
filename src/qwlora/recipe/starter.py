"""Recipes that `qwlora init` writes.

starter_recipe()    starter.yaml: the settings most people change
full_recipe()       every key with its description; those with a default are commented out
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from pydantic import BaseModel

from qwlora.recipe import PRESETS, Adapter, Recipe
from qwlora.recipe.yaml_core import flow

_HEAD = """\
# A QWLoRA recipe with every option. Run it with: qwlora run THIS_FILE --out out
# Commented lines show defaults; uncomment a line to change it.
"""
_PLACEHOLDERS = {"model.source": "path/to/model", "data.source": "path/to/text"}
_ADAPTER = PRESETS[Recipe.model_fields["preset"].default]["adapter"]


def starter_recipe() -> str:
    """A short recipe: two sources to fill in, and the settings that most people change."""
    return files("qwlora.recipe").joinpath("starter.yaml").read_text(encoding="utf-8")


def full_recipe() -> str:
    """Every key with its description: required keys with placeholders, the rest commented out."""
    return _HEAD + "\n".join(_section(Recipe, "", is_set=True)) + "\n"


def _section(kind: type[BaseModel], path: str, is_set: bool) -> list[str]:
    """The lines of a section; commented out unless `is_set` and without a default."""
    lines = []
    for name, field in kind.model_fields.items():
        where, inner = f"{path}{name}", field.annotation
        comment = f"  # {field.description}" if field.description else ""
        lines += [] if path else [""]
        if where == "adapters":
            item = _section(Adapter, "adapters.", is_set=True)
            first = item.index(next(line for line in item if line.startswith("name:")))
            item = [item.pop(first), *item]
            lines += [f"adapters:{comment}", f"  - {item[0]}", *(f"    {x}" for x in item[1:])]
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            shown = is_set and where in ("model", "data")
            body = _section(inner, f"{where}.", is_set=shown)
            lines += [f"{'' if shown else '# '}{name}:{comment}"]
            lines += [f"  {line}" if shown else f"#   {line.removeprefix('# ')}" for line in body]
        else:
            given: Any = _ADAPTER.get(name, field.default) if path == "adapters." else field.default
            required = is_set and (where in _PLACEHOLDERS or where == "adapters.name")
            value = flow(_PLACEHOLDERS.get(where, "first") if required else given)
            lines.append(f"{'' if required or not is_set else '# '}{name}: {value}{comment}")
    return lines
