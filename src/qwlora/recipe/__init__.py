"""The recipe: one YAML file with all settings of a job, fully validated before torch is imported.

Defaults and descriptions are written once, in the fields; `qwlora init` and the recipe reference
print them. Validation reports all problems at once: unknown keys (with the closest valid key),
wrong types, values out of range, combinations that cannot work, and sources that do not exist.
"""

from qwlora.recipe.adapter_section import Adapter, Data
from qwlora.recipe.grid_sections import Base
from qwlora.recipe.recipe_file import load_recipe, parse_recipe
from qwlora.recipe.whole_recipe import PRESETS, Recipe

__all__ = ["PRESETS", "Adapter", "Base", "Data", "Recipe", "load_recipe", "parse_recipe"]
