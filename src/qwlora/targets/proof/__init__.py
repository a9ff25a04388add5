"""The proof of exported files: run them in their runtime, and compare with what was trained."""
