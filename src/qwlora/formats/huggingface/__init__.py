"""Checkpoints in Hugging Face folders: floats, GPTQ and AWQ, compressed-tensors, MLX."""
