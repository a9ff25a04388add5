"""The line that every result carries: the machine, the threads, the versions."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from qwlora.system.processor import processor_name

PACKAGES = ("torch", "transformers", "peft", "onnx", "onnxruntime")


def machine_line(packages: tuple[str, ...] = PACKAGES) -> str:
    """Processor, threads, Python and packages."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    threads, python = torch.get_num_threads(), platform.python_version()
    return f"{processor_name()}, {threads} threads, Python {python}, {versions}"
