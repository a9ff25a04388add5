"""Run a float ONNX model with its encodings in ONNX Runtime, and check both against each other.

Everything comes from the delivered files: each activation entry becomes a QuantizeLinear and a
DequantizeLinear behind its tensor; parameters are checked to lie on the grid of their entry, so
rounding them would change nothing. Nothing of the simulation is read.

Shapes are fixed. Shorter sequences are padded on the right and masked; their outputs are cut.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn

from qwlora.errors import ExportError, GridError, SourceError, VerificationError
from qwlora.export.onnx.onnx_runtime import (
    EIGHT_BIT_OPTIONS,
    SESSION_OPTIONS,
    load_graph,
    open_session,
    run_layers_of,
    run_session,
)
from qwlora.export.runtime import Runtime
from qwlora.formats import aimet_encodings as files
from qwlora.formats.aimet_encodings.grids import TensorLayout, grid_of
from qwlora.formats.aimet_encodings.model import EncodingsFile, Entry, IntegerEncoding
from qwlora.graph.capture import IDS, MASK
from qwlora.grid.encoding import Encoding
from qwlora.system.optional_packages import require

ROUNDED = ".rounded"  # of a tensor: its value on its grid
# Q/DQ pairs stay as they are, and ONNX Runtime quantizes no float weight by itself
OPTIONS = SESSION_OPTIONS | EIGHT_BIT_OPTIONS


class FloatOnnxModel(Runtime):
    """A float model and its encodings, in ONNX Runtime on the CPU.

    Args:
        model: the .onnx file.
        encodings: the .encodings file.
        weights: a safetensors file whose tensors replace initializers of the same names.
    """

    has_layers = True

    def __init__(self, model: Path, encodings: Path, weights: Path | None = None):
        self.model, self.encodings, self.weights = model, encodings, weights

    @cached_property
    def file(self) -> EncodingsFile:
        return files.read_encodings(self.encodings)

    @cached_property
    def graph(self) -> dict[str, files.OnnxTensor]:
        return files.read_graph(self.model)

    def check(self) -> None:
        """Check every promise of the two files.

        Raises:
            VerificationError: an entry names no tensor, is in the wrong section or does not fit the
                tensor's shape; or a parameter is not on the grid of its entry. All are listed.
        """
        problems = [
            f"{self.encodings.name}: {finding}"
            for finding in files.validate(self.encodings, self.model)
            if finding.severity == "error"
        ]
        if not problems:
            problems = [
                f"{self._file_of(name)}: {name} is not on the grid of its entry in "
                f"{self.encodings.name} ({problem})"
                for name in self.parameters
                if (problem := self._off_grid(name)) is not None
            ]
        if problems:
            raise VerificationError(
                f"{self.model.parent}: the files contradict each other", problems
            )

    def _file_of(self, name: str) -> str:
        replaced = self.weights is not None and name in load_file(self.weights)
        return self.weights.name if replaced and self.weights else self.model.name

    @property
    def parameters(self) -> list[str]:
        """Names of the encoded initializers."""
        return [e.name for e in self.file.encodings if self.graph[e.name].parameter]

    @property
    def activations(self) -> list[str]:
        """Names of the encoded tensors that are computed."""
        return [e.name for e in self.file.encodings if not self.graph[e.name].parameter]

    def codes(self, name: str) -> Tensor:
        """The integers of a parameter [..., out, in]: its stored values, rounded on its grid."""
        grid, values = self._parameter(name)
        return grid.quantize(values)

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name, given every input by name."""
        session = self.session
        tokens, padded = self._padded(tensors)
        found = run_session(session, [o.name for o in session.get_outputs()], padded)
        return {name: value[:, :tokens] for name, value in found.items()} if tokens else found

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self.run({IDS: ids, MASK: torch.ones_like(ids)})["logits"]

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every activation in `values`, computed from the others in `values`; see `Runtime`."""
        stored = {name: self._initializers[name] for name in self.parameters if name in values}
        computed = {name: value for name, value in values.items() if name not in stored}
        with tempfile.TemporaryDirectory() as scratch:
            session = open_session(self.with_grids(Path(scratch), computed), OPTIONS)
            given = {f"{name}.in": value for name, value in computed.items()}
            outputs = [f"{name}.out" for name in computed]
            found = run_session(session, outputs, {**tensors, **given})
        return {name: stored[name] if name in stored else found[f"{name}.out"] for name in values}

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        with tempfile.TemporaryDirectory() as scratch:
            found = run_layers_of(self.with_grids(Path(scratch)), OPTIONS, tensors)
        return tensors, {name.removesuffix(ROUNDED): value for name, value in found.items()}

    @cached_property
    def session(self) -> Any:
        """The model on its grids in ONNX Runtime; loaded when it is first used."""
        with tempfile.TemporaryDirectory() as scratch:
            return open_session(self.with_grids(Path(scratch)), OPTIONS)

    def _padded(self, tensors: Mapping[str, Tensor]) -> tuple[int | None, dict[str, Tensor]]:
        """(tokens to keep, inputs of the fixed shapes)."""
        wanted = {i.name: tuple(i.shape) for i in self.session.get_inputs()}
        tokens, padded = None, dict(tensors)
        for name in [name for name in tensors if name in wanted]:
            count = tensors[name].shape[-1]
            missing = wanted[name][-1] - count
            if missing < 0:
                raise ExportError(
                    f"{self.model}: input {name} has {count} tokens, but the graph was written for "
                    f"{wanted[name][-1]}"
                )
            if missing:
                tokens, padded[name] = count, nn.functional.pad(tensors[name], (0, missing))
        return tokens, padded

    def _parameter(self, name: str) -> tuple[Encoding, Tensor]:
        """(grid, values), both of the tensor as [..., out, in]."""
        values = self._initializers[name]
        transposed = values.ndim == 2 and self.graph[name].channel_axis == 1
        values = values.T if transposed else values
        layout = TensorLayout(tuple(values.shape), transposed, 0, "channel")
        return grid_of(self.file.by_name[name], layout, self.file.version), values

    def _off_grid(self, name: str) -> str | None:
        try:
            grid, values = self._parameter(name)
        except (SourceError, GridError) as error:
            return str(error)
        wrong = int((grid.fake_quantize(values) != values).sum())
        return f"{wrong} of {values.numel()} values" if wrong else None

    @cached_property
    def _initializers(self) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.array(value.const_value.numpy()))
            for name, value in self._load().graph.initializers.items()
            if name in self.file.by_name
        }

    def _load(self) -> Any:
        model = load_graph(self.model)
        for name, array in load_file(self.weights).items() if self.weights else ():
            tensor = require("onnx_ir", "onnx").tensor(array, name=name)
            model.graph.initializers[name].const_value = tensor
        return model

    def with_grids(self, folder: Path, cut: Collection[str] | None = None) -> Path:
        """Write the model with Q/DQ nodes into `folder`.

        Args:
            cut: tensors whose readers read a new input `NAME.in`, and which become outputs
                `NAME.out`. Default: none, the whole model.
        """
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        ir, model = require("onnx_ir", "onnx"), self._load()
        values = {o.name: o for node in model.graph for o in node.outputs}
        values |= {value.name: value for value in model.graph.inputs}
        if cut is not None:
            model.graph.outputs.clear()
        for name in self.activations:
            rounded = _round(model, values[name], self.file.by_name[name])
            if cut is not None and name in cut:
                rounded.name = f"{name}.out"
                given = ir.Value(name=f"{name}.in", type=rounded.type, shape=rounded.shape)
                ir.convenience.replace_all_uses_with(rounded, given)
                model.graph.inputs.append(given)
                model.graph.outputs.append(rounded)
        RemoveUnusedNodesPass()(model)
        path = folder / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data")
        return path


def _round(model: Any, value: Any, entry: Entry) -> Any:
    """Insert Q/DQ after `value`; its readers, and a graph output, read the result."""
    if not isinstance(entry, IntegerEncoding) or entry.scale.ndim:
        raise ExportError(f"{entry.name}: activations have one integer grid per tensor")
    if entry.bitwidth not in (8, 16):
        raise ExportError(f"{entry.name}: ONNX has no {entry.bitwidth}-bit QuantizeLinear")
    ir, grid = require("onnx_ir", "onnx"), []
    arrays = {
        "scale": entry.scale.astype(np.float32),
        "zero_point": (-entry.offset).astype(f"uint{entry.bitwidth}"),
    }
    for part, array in arrays.items():
        name = f"{entry.name}.{part}"
        grid.append(ir.val(name, const_value=ir.tensor(np.asarray(array), name=name)))
        model.graph.register_initializer(grid[-1])
    readers = list(value.uses())
    codes = ir.node("QuantizeLinear", [value, *grid])
    rounded = ir.node("DequantizeLinear", [codes.outputs[0], *grid])
    result = rounded.outputs[0]
    result.type, result.shape, result.name = value.type, value.shape, f"{entry.name}{ROUNDED}"
    if (producer := value.producer()) is None:
        model.graph.insert_before(model.graph[0], [codes, rounded])
    else:
        model.graph.insert_after(producer, [codes, rounded])
    for node, index in readers:
        node.replace_input_with(index, result)
    if value.is_graph_output():
        for index, output in enumerate(model.graph.outputs):
            if output is value:
                model.graph.outputs[index] = result
        value.name, result.name = f"{value.name}.float", value.name
    return result
