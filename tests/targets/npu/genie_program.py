"""Runs a bundle in Qualcomm's own Genie, libGenie.so of onnxruntime-qnn, on the HTP emulator.

    python genie_program.py CONFIG < request      {"ids": [...], "count": 8, "runs": [["first", 1]]}
    -> a last line of JSON: {"config": 0, "create": 0, "tokens": [[...]]}

Genie is a library of C++ that ends the process when it fails, so it runs in one of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

Token = ctypes.c_uint32
Callback = ctypes.CFUNCTYPE(None, ctypes.POINTER(Token), Token, ctypes.c_int, ctypes.c_void_p)
ROLE, ALPHA = b"primary", b"lora_alpha"


def library(name: str) -> Any:
    """A library of the wheel; Genie opens the others by name."""
    spec = importlib.util.find_spec("onnxruntime_qnn")
    assert spec is not None
    folder = Path(next(iter(spec.submodule_search_locations or [])))
    return ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)


def run(config: Path, request: dict[str, Any]) -> dict[str, Any]:
    library("libQnnSystem.so")
    genie, handle, dialog = library("libGenie.so"), ctypes.c_void_p(), ctypes.c_void_p()
    text = config.read_text().encode()
    found: dict[str, Any] = {
        "config": genie.GenieDialogConfig_createFromJson(text, ctypes.byref(handle)),
        "tokens": [],
    }
    if found["config"] or not request:
        return found
    os.chdir(config.parent)
    found["create"] = genie.GenieDialog_create(handle, ctypes.byref(dialog))
    if found["create"]:
        return found
    genie.GenieDialog_setMaxNumTokens(dialog, request["count"])
    ids = (Token * len(request["ids"]))(*request["ids"])
    for adapter, alpha in request["runs"]:
        tokens: list[int] = []

        def take(codes: Any, count: int, code: int, data: Any, tokens: list[int] = tokens) -> None:
            tokens.extend(codes[i] for i in range(count))

        assert genie.GenieDialog_reset(dialog) == 0
        assert genie.GenieDialog_applyLora(dialog, ROLE, adapter.encode()) == 0
        strength = ctypes.c_float(alpha)
        assert genie.GenieDialog_setLoraStrength(dialog, ROLE, ALPHA, strength) == 0
        assert genie.GenieDialog_tokenQuery(dialog, ids, len(ids), 0, Callback(take), None) == 0
        found["tokens"].append(tokens)
    return found


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), json.load(sys.stdin))))
