"""Reader for GGUF files (llama.cpp)."""
