"""Runs a recipe as stages over one output directory.

A stage reads the artifacts of earlier stages and writes its own. It is skipped if nothing that it
depends on has changed.
"""

# The commands that run stages: the first part of a stage's name.
VERBS = ("quantize", "train", "calibrate", "export", "verify", "evaluate")
