"""Model files on disk: Hugging Face folders, GGUF, GPTQ, AWQ, compressed-tensors, MLX, AIMET
encodings, and QWLoRA's own base. `checkpoint.py` defines the interface of all readers,
`open_checkpoint.py` picks one.
"""

MLX_BITWIDTHS = (2, 3, 4, 5, 6, 8)
