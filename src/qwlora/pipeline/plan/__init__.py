"""The stages of a recipe, which of them are out of date, and what must hold before they run."""
