"""The line that every result carries: the machine, the threads, the versions."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path

import torch

PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime")


def machine_line() -> str:
    """Processor, threads, Python and packages."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    processor = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{processor}, {torch.get_num_threads()} threads, Python {platform.python_version()}, {packages}"
