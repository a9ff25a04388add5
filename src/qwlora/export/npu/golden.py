"""Golden inputs and outputs: one batch, and what the simulation or ONNX Runtime computes of it, to
compare with a device.

    golden/input_ids.npy ...    every input of the graph, with its type
    golden/logits.npy ...       every output
    golden/golden.json          name, role, type, shape and SHA-256 of each

A device's output cannot equal a simulation bit for bit (noise floor): compare SQNR and the
likeliest token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from qwlora.system import strict_json

FOLDER = "golden"


def write_golden(folder: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Write one batch and its outputs into a new folder."""
    folder.mkdir(parents=True)
    record = {
        role: [write_array(folder, name, tensor) for name, tensor in tensors.items()]
        for role, tensors in (("inputs", inputs), ("outputs", outputs))
    }
    (folder / "golden.json").write_text(strict_json.dumps(record, indent=1) + "\n")


def write_array(folder: Path, name: str, tensor: Tensor) -> dict[str, object]:
    """Write a tensor as `NAME.npy`; returns its entry in the record."""
    path = folder / f"{name}.npy"
    array = tensor.detach().cpu().numpy()
    np.save(path, array, allow_pickle=False)
    return {
        "name": name,
        "file": path.name,
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
