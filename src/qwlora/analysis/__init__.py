"""What quantization costs, where, and what to change: perplexity, sensitivity, mixed precision, inspection."""
