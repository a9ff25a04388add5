"""Targets that hold the base's integers and float adapters: hf, gguf, mlx, executorch."""
