"""QWLoRA: fine-tune LoRA adapters on the exact quantized weights you deploy.

    quantize_        step 1: freeze a model's weights to packed integers, in place
    freeze_          the same on a grid that you have, without rounding anything
    assert_frozen    check that every packed layer still computes with its integers
    save_adapter     after step 2, which is PEFT with your own training loop or Trainer: save the
                     adapter with the fingerprint of its base
    simulate         step 3: capture a graph and calibrate activation and adapter encodings
    export           step 4: write the files for a runtime
    verify           step 5: run these files and compare them with what was trained

Names are imported on first use: importing this package imports neither torch nor transformers.
`import qwlora.hf` makes transformers' `from_pretrained` load the folders that `save_base` writes.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

# The stub, which type checkers read, is also the list of names: it has nothing but imports.
_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {
    alias.name: node.module
    for node in ast.parse(_STUB).body
    if isinstance(node, ast.ImportFrom) and node.module
    for alias in node.names
}
__all__ = list(_HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'qwlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
