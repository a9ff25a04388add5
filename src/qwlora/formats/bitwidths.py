"""Bitwidths that the formats of other tools have. Imports no torch."""

GPTQ_BITWIDTHS = (2, 3, 4, 8)
MLX_BITWIDTHS = (2, 3, 4, 5, 6, 8)
