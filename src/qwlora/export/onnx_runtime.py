"""Run an exported ONNX file, whole or layer by layer.

By default ONNX Runtime quantizes to 8 bits, by itself, the activations that meet 4-bit weights. `SESSION_OPTIONS` turn that off. Where activations have 8 bits
it puts integer kernels of its own (QLinearSoftmax, QLinearAdd, QLinearMatMul ...) in the place of what was simulated, which round elsewhere; the option
in `EIGHT_BIT_OPTIONS` turns that off too, at the price of weights that it unpacks to floats. The options that a file needs are written beside it, because
without them it does not compute what was trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.errors import ExportError, reading
from qwlora.export.onnx_model import DATA_FILE, MODEL_FILE, activation_tensor
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.system.optional_packages import require

SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
EIGHT_BIT_OPTIONS = {"session.disable_quant_qdq": "1"}
OPTIONS_FILE = "session_options.json"
LAYERS_FILE = "layers.onnx"


def write_session_options(graph: QuantizedGraph, folder: Path) -> None:
    """Write the options that a faithful session of `graph` needs, as `add_session_config_entry` takes them."""
    narrow = any(
        m.kind is Kind.ACTIVATION and graph.encodings[m.name].scheme.bitwidth <= 8
        for m in graph.marks
    )
    options = SESSION_OPTIONS | (EIGHT_BIT_OPTIONS if narrow else {})
    write_text(folder / OPTIONS_FILE, strict_json.dumps(options, indent=1) + "\n")


def read_session_options(folder: Path) -> dict[str, str]:
    """The options beside a file; `SESSION_OPTIONS` where nobody wrote any."""
    path = folder / OPTIONS_FILE
    with reading(path):
        options: dict[str, str] = (
            json.loads(path.read_text()) if path.is_file() else SESSION_OPTIONS
        )
    return options


def open_session(path: Path, session_options: Mapping[str, str]) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ExportError: ONNX Runtime refuses the file; its own message is kept.
        MissingExtraError: the `onnx` extra is not installed.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    for key, value in session_options.items():
        options.add_session_config_entry(key, value)
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {error}") from error


class OnnxModel:
    """An exported model, whatever it takes and returns."""

    def __init__(self, folder: Path):
        self.session = open_session(folder / MODEL_FILE, read_session_options(folder))
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name, for all inputs by name.

        Raises:
            ExportError: an input is missing.
        """
        found = self.session.run(
            None, {name: tensors[name].numpy() for name in _present(self.inputs, tensors)}
        )
        return {
            name: torch.from_numpy(value) for name, value in zip(self.outputs, found, strict=True)
        }


class OnnxLanguageModel(OnnxModel):
    """Logits of an exported causal language model."""

    def logits(self, ids: Tensor) -> Tensor:
        """Logits of full sequences, [batch, tokens, vocabulary]: every position is attended to."""
        return self.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]


class OnnxLayers:
    """Every layer of an exported model, each fed from outside: the value behind one quantizer depends on no other layer's output.

    The exported graph is cut at each quantized activation: what reads it reads a graph input instead, and its own value becomes a graph output.
    """

    def __init__(self, folder: Path, activations: list[str], scratch: Path):
        self.activations = activations
        _cut_at(folder, activations, scratch / LAYERS_FILE)
        self.session = open_session(scratch / LAYERS_FILE, read_session_options(folder))
        self.wanted = {i.name for i in self.session.get_inputs()}

    def run(self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each layer's own output, given the simulation's `values` at every layer's input, and the model's inputs by name."""
        inside = {activation_tensor(name, tensors): value for name, value in values.items()}
        known = {**tensors, **inside}
        outputs = self.session.run(
            [f"{n}.out" for n in self.activations],
            {name: known[name].numpy() for name in _present(self.wanted, known)},
        )
        return {
            name: torch.from_numpy(o) for name, o in zip(self.activations, outputs, strict=True)
        }


def _present(names: Iterable[str], tensors: Mapping[str, Tensor]) -> list[str]:
    names = list(names)
    if missing := [name for name in names if name not in tensors]:
        raise ExportError(
            f"the exported model takes {', '.join(names)}; {missing[0]} was not given"
        )
    return names


def _cut_at(folder: Path, activations: list[str], path: Path) -> None:
    import onnx_ir as ir

    model = ir.load(folder / MODEL_FILE)
    values = {o.name: o for node in model.graph for o in node.outputs}
    inputs = {value.name for value in model.graph.inputs}
    model.graph.outputs.clear()
    for name in activations:
        tensor = activation_tensor(name, inputs)
        value = values[tensor]
        value.name = f"{name}.out"
        outside = ir.Value(name=tensor, type=value.type, shape=value.shape)
        ir.convenience.replace_all_uses_with(value, outside)
        if outside.uses():
            model.graph.inputs.append(outside)
        model.graph.outputs.append(value)
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    ir.save(model, path, external_data=DATA_FILE)
