"""Step 2: attach LoRA adapters to a frozen base, train and save them with its fingerprint."""
