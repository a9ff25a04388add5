"""The recipe: what a user asks for, in one YAML file, validated whole before torch is imported.

Each field's default and description are written once, here; `qwlora init` and the recipe reference print them. Validation gathers every problem: unknown keys
(with the nearest valid one), wrong types, values out of range, combinations that cannot work, and sources that are not there.
"""

from qwlora.recipe.adapter_section import Adapter
from qwlora.recipe.base_section import Base
from qwlora.recipe.recipe_file import load_recipe
from qwlora.recipe.whole_recipe import PRESETS, Recipe

__all__ = ["PRESETS", "Adapter", "Base", "Recipe", "load_recipe"]
