"""Readers of precomputed bases: each makes a `Checkpoint` of one format's files."""
