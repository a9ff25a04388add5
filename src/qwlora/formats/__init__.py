"""Checkpoints on disk, one format a file or folder: safetensors, GGUF, GPTQ, AWQ, compressed-tensors, our own base."""
