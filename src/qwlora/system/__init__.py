"""The machine: processor, memory, signals and installed packages.

Importing these modules does not import torch.
"""
