"""Run a float ONNX model with its encodings in ONNX Runtime, and check both against each other.

Everything comes from the delivered files: each activation entry of integers becomes a
QuantizeLinear and a DequantizeLinear behind its tensor; parameters are checked to lie on the grid
of their entry, so rounding them would change nothing. What is a float16 on the device is a float32
here. Nothing of the simulation is read. Other damage is found by the digests of the files.

Shapes are fixed. Shorter sequences are padded on the right and masked; their outputs are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from qwlora.errors import (
    EncodingsFileError,
    ExportError,
    GridError,
    SourceError,
    foreign_as,
)
from qwlora.formats import aimet_encodings as files
from qwlora.formats.aimet_encodings.grids import TensorLayout, grid_of
from qwlora.formats.aimet_encodings.model import EncodingsFile
from qwlora.graph.capture import IDS, MASK
from qwlora.grid.encoding import Encoding
from qwlora.system.optional_packages import require
from qwlora.targets.onnx.onnx_edits import constants, insert_rounding, load_graph, tensor_of
from qwlora.targets.onnx.onnx_model import OPSET, activation_arrays, activation_tensor
from qwlora.targets.onnx.onnx_runtime import (
    EIGHT_BIT_OPTIONS,
    SESSION_OPTIONS,
    OnnxModel,
    open_model,
)


class FloatOnnxModel(OnnxModel):
    """A float model and its encodings as a QDQ model, in ONNX Runtime on the CPU.

    Args:
        model: the .onnx file.
        encodings: the .encodings file.
        weights: a safetensors file whose tensors replace initializers of the same names.
    """

    # Q/DQ pairs stay as they are, and ONNX Runtime quantizes no float weight by itself
    session_options = SESSION_OPTIONS | EIGHT_BIT_OPTIONS

    def __init__(self, model: Path, encodings: Path, weights: Path | None = None):
        super().__init__(model.parent)
        self.model, self.encodings, self.weights = model, encodings, weights

    @cached_property
    def session(self) -> Any:
        return open_model(self.load(), self.session_options)

    @cached_property
    def file(self) -> EncodingsFile:
        return files.read_encodings(self.encodings)

    @cached_property
    def graph(self) -> dict[str, files.OnnxTensor]:
        return files.read_graph(self.model)

    def problems(self) -> list[str]:
        """Promises that the two files break: an entry names no tensor, is in the wrong section or
        does not fit the tensor's shape; if there is none, parameters that are not on the grid of
        their entry."""
        where = self.encodings.name
        try:
            findings = files.validate(self.encodings, self.model)
        except EncodingsFileError as error:
            return [f"{where}: {error}"]
        if problems := [f"{where}: {found}" for found in findings if found.severity == "error"]:
            return problems
        for name, stored in self.parameters().items():
            file = self.weights if self.weights and name in self.replaced else self.model
            try:
                grid, values = self.grid(name, stored)
                wrong = int((grid.fake_quantize(values) != values).sum())
                problem = f"{wrong} of {values.numel()} values" if wrong else ""
            except (SourceError, GridError) as error:
                problem = str(error)
            if problem:
                problems.append(
                    f"{file.name}: {name} is not on the grid of its entry in {where} ({problem})"
                )
        return problems

    def parameters(self) -> dict[str, Tensor]:
        """The encoded initializers by name; read again in every call."""
        initializers = self._load_float().graph.initializers
        names = (e.name for e in self.file.encodings if self.graph[e.name].parameter)
        with foreign_as(ExportError, f"the weights of {str(self.model)!r} cannot be read"):
            return {name: tensor_of(initializers[name]) for name in names}

    def grid(self, name: str, values: Tensor) -> tuple[Encoding, Tensor]:
        """Grid and values of a parameter, both of the tensor as [..., out, in]."""
        transposed = values.ndim == 2 and self.graph[name].channel_axis == 1
        values = values.T if transposed else values
        layout = TensorLayout(tuple(values.shape), transposed, 0, "channel")
        return grid_of(self.file.by_name[name], layout, self.file.version), values

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shapes = {i.name: tuple(i.shape) for i in self.session.get_inputs()}
        tokens, padded = None, dict(tensors)
        for name in tensors.keys() & shapes.keys():
            count, size = tensors[name].shape[-1], shapes[name][-1]
            if count > size:
                raise ExportError(
                    f"{self.model}: input {name} has {count} tokens, but the graph was written for "
                    f"{size}"
                )
            if count < size:
                tokens, padded[name] = count, nn.functional.pad(tensors[name], (0, size - count))
        outputs = super().run(padded)
        return {name: value[:, :tokens] for name, value in outputs.items()} if tokens else outputs

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self.run({IDS: ids, MASK: torch.ones_like(ids)})["logits"]

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        stored = {name: value for name, value in self.parameters().items() if name in values}
        computed = {name: value for name, value in values.items() if name not in stored}
        return super().run_layers(computed, tensors) | stored

    @cached_property
    def replaced(self) -> Mapping[str, Any]:
        """The arrays in `weights`."""
        if self.weights is None:
            return {}
        with foreign_as(ExportError, f"{str(self.weights)!r} cannot be read"):
            return load_file(self.weights)

    def _load_float(self) -> Any:
        model = load_graph(self.model)
        for name, array in self.replaced.items():
            value = model.graph.initializers.get(name)
            if value is None or tuple(value.shape) != array.shape:
                raise ExportError(
                    f"{self.weights}: {name} of shape {list(array.shape)} is not a weight of "
                    f"{self.model.name}. Copy the files again"
                )
            value.const_value = require("onnx_ir", "onnx").tensor(array, name=name)
        return model

    def load(self) -> Any:
        """The model with Q/DQ after every tensor with an encoding that is computed."""
        model = self._load_float()
        inputs = {value.name for value in model.graph.inputs}
        values = {output.name: output for node in model.graph for output in node.outputs}
        values |= {value.name: value for value in model.graph.inputs}
        for entry in self.file.encodings:
            if self.graph[entry.name].parameter or isinstance(entry, files.FloatEncoding):
                continue
            name, value = entry.name, values[entry.name]
            encoding = grid_of(entry, TensorLayout((1,)), self.file.version)
            grid = constants(model, name, activation_arrays(name, encoding))
            if name not in inputs:
                value.name = f"{name}.float"
            readers, tensor = [user for user, _ in value.uses()], activation_tensor(name, inputs)
            result = insert_rounding(model, value, tensor, grid, readers, f"{name}.codes")
            for index, output in enumerate(model.graph.outputs):
                if output is value:
                    model.graph.outputs[index] = result
        if model.graph.opset_imports[""] < OPSET:  # whose nodes take 8 bits only
            for node in model.graph:
                if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                    node.domain = "com.microsoft"
            model.graph.opset_imports["com.microsoft"] = 1
        return model
