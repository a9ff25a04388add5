"""What the processor says about itself. Imports no torch."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_facts() -> dict[str, str]:
    """Names and values of the first core in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return {}
    facts: dict[str, str] = {}
    for name, _, value in (line.partition(":") for line in lines):
        facts.setdefault(name.strip(), value.strip())
    return facts


def processor_name() -> str:
    """The processor's model, for example "AMD EPYC 9B14"; empty if it is unknown."""
    return processor_facts().get("model name") or platform.processor()
