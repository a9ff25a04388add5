"""Perplexity, sensitivity of activations, mixed precision, and inspection of model files."""
