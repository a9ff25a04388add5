"""Adapters of ONNX Runtime: inputs that have a default in the model, and files with other values.

ONNX Runtime takes no scalars, and of integers only those of 8 bits and more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlora.errors import ExportError, foreign_as
from qwlora.system.optional_packages import require

if TYPE_CHECKING:
    import numpy as np

ADAPTER_FILE = "adapter.onnx_adapter"


def add_input(
    model: Any,
    name: str,
    default: np.ndarray[Any, Any],
    shape: Sequence[int | str],
    replaced: Any = None,
) -> Any:
    """Add an input with a default to an `onnx_ir.Model`.

    Args:
        shape: with names for axes of any size; it says more than that of the default.
        replaced: the initializer that the input takes the place of.
    """
    ir = require("onnx_ir", "onnx")
    tensor = ir.tensor(default, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(shape), const_value=tensor
    )
    if replaced is not None:
        ir.convenience.replace_all_uses_with(replaced, value)
        model.graph.initializers.pop(replaced.name, None)
    model.graph.register_initializer(value)
    model.graph.inputs.append(value)
    return value


def write_adapter_file(values: Mapping[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Write an `.onnx_adapter` file with the values of inputs by name."""
    runtime = require("onnxruntime", "onnx")
    written = runtime.AdapterFormat()
    written.set_adapter_version(1)
    written.set_model_version(1)
    written.set_parameters(
        {name: runtime.OrtValue.ortvalue_from_numpy(array) for name, array in values.items()}
    )
    written.export_adapter(str(path))


class ActiveAdapter:
    """An adapter file, and the options with which `InferenceSession.run` applies it.

    Raises:
        ExportError: ONNX Runtime refuses the file.
    """

    def __init__(self, path: Path):
        runtime = require("onnxruntime", "onnx")
        self._adapter = runtime.LoraAdapter()  # the options do not keep it alive
        self.options: Any = runtime.RunOptions()
        with foreign_as(ExportError, f"ONNX Runtime cannot load {str(path)!r}"):
            self._adapter.Load(str(path))
            self.options.add_active_adapter(self._adapter)
