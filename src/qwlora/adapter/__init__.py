"""Step 2: attach LoRA adapters to a frozen base, train them, save them with the base's fingerprint."""
