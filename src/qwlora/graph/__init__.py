"""The captured graph: torch.export capture, its bit-for-bit check, what its structure says, dynamic shapes."""
