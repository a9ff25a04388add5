"""Recipes that QWLoRA writes itself.

starter_recipe()      starter.yaml: the settings most people change (`qwlora init`)
example_path(name)    a file of examples/ (`qwlora init --example`, `qwlora try`)
full_recipe()         every key with its description; those with a default are commented out
                      (`qwlora init --full`)
short_recipe(...)     the keys of `qwlora train MODEL DATA`
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from qwlora.errors import RecipeError
from qwlora.recipe import PRESETS, Adapter, Recipe
from qwlora.recipe.recipe_file import target_of
from qwlora.recipe.yaml_core import flow
from qwlora.system.parameter_names import NAME_PATTERN
from qwlora.targets.registry import TARGETS

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


def example_path(name: str) -> Path:
    """The packaged recipe of that name."""
    folder = Path(str(files("qwlora.recipe"))) / "examples"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise RecipeError(
            "the command line", [f"there is no example {name!r}; there are {', '.join(names)}"]
        )
    return folder / f"{name}.yaml"


def short_recipe(model: str, data: str, runtime: str) -> dict[str, Any]:
    """A recipe for one adapter, named after its data.

    Args:
        runtime: a target, or a program that runs its files.
    """
    known = ["llama.cpp", "onnxruntime", "transformers", "vllm", "qualcomm", *TARGETS]
    if (target := target_of(runtime)) is None:
        raise RecipeError(
            "the command line",
            [f"--for {runtime!r}: no target is for this program. Give {', '.join(known)}"],
        )
    words = re.findall(r"[A-Za-z0-9_-]+", data.rpartition("/")[2].rpartition(":")[2])
    name = next((word for word in words if re.match(NAME_PATTERN, word)), "first")
    recipe: dict[str, Any] = {"model": {"source": model}, "data": {"source": data}}
    # These runtimes store the integers of a GGUF file as they are.
    if Path(model).suffix == ".gguf" and target in ("gguf", "mlx"):
        recipe["base"] = {"solver": "keep"}
    return recipe | {"adapters": [{"name": name}], "export": {"targets": [target]}}


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
