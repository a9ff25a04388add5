"""What all other packages build on: atomic writes, JSON, progress, names; and the machine.

Importing these modules does not import torch.
"""
