"""Golden inputs and outputs: one batch and what the simulation computes of it, for the device.

    golden/input_ids.npy ...    every input of the graph, with its type
    golden/logits.npy ...       every output, simulated
    golden/golden.json          name, role, type, shape and SHA-256 of each

A device's output cannot equal a simulation bit for bit (`verify.py`, noise floor): compare SQNR and
the likeliest token.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from torch import Tensor

from qwlora import strict_json
from qwlora.export.target import ExportedGraph

FOLDER, RECORD = "golden", "golden.json"


def write_golden(exported: ExportedGraph, folder: Path, case: str = "") -> None:
    """Write the sample and its simulated outputs into `folder / "golden"`, or below it in the
    folder of a use case."""
    golden = folder / FOLDER / case
    golden.mkdir(parents=True)
    inputs = exported.simulation.bind(exported.sample)
    outputs = exported.simulation.outputs(exported.sample)
    record = {
        "inputs": [write_array(golden, name, tensor) for name, tensor in inputs.items()],
        "outputs": [write_array(golden, name, tensor) for name, tensor in outputs.items()],
    }
    (golden / RECORD).write_text(strict_json.dumps(record, indent=1) + "\n")


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
