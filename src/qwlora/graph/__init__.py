"""Capture with torch.export, the bit-for-bit check, graph analysis, dynamic shapes."""
