"""Runs a recipe as stages over one output directory. A stage that is up to date is skipped."""

# The commands that run stages: the first part of a stage's name.
VERBS = ("quantize", "train", "calibrate", "export", "verify", "evaluate")
