"""The machine that a run has: its processor, memory, signals and installed packages.

Nothing here imports torch when it is loaded.
"""
