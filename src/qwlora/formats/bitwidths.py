"""Bitwidths that the formats of other tools have. Imports no torch."""

MLX_BITWIDTHS = (2, 3, 4, 5, 6, 8)
