"""The keys of a recipe as text: what `qwlora init` writes.

starter_recipe()      starter.yaml: the settings most people change
full_recipe()         every key with its description; those with a default are commented out
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files

from pydantic import BaseModel

from qwlora.recipe import PRESETS, Adapter, Recipe
from qwlora.recipe.yaml_core import flow

_FULL = """\
# A QWLoRA recipe with every option. Run it with: qwlora run
# Commented lines show defaults; uncomment a line to change it.
"""
_SET = {  # the keys without a default, and their sections
    **dict.fromkeys(("model", "data", "adapters")),
    **{"model.source": "path/to/model", "data.source": "path/to/text", "adapters.name": "first"},
}


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
