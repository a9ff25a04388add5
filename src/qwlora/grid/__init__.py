"""The maths of the integer grid: schemes, encodings, observers, packing. Import the modules, not
this package. They import torch and, of QWLoRA, only errors and `system`."""

# scheme.py alone is free of torch, so that a recipe can be validated before torch is loaded
