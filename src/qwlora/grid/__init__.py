"""The maths of the integer grid: schemes, encodings, observers, packing. Imports torch and nothing
of QWLoRA but its errors.

`scheme.py` alone is free of torch, so that a recipe can be validated before torch is loaded; import
the modules, not this package.
"""
