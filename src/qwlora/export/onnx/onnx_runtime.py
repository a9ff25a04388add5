"""Run an exported ONNX model, as a whole or layer by layer.

A model with a key-value cache has inputs that a simulation does not have. Those that are not given
are those of a whole sequence:

    past_key_values.N.key, .value    without tokens
    position_ids                     0, 1, 2, ... from the first token that attention_mask shows

Without these options of ONNX Runtime, a quantized model computes something else. They are exported
with it, and a file with other options is refused:

    SESSION_OPTIONS      do not quantize the activations of 4-bit weights to 8 bits
    EIGHT_BIT_OPTIONS    for 8-bit activations: do not replace Q/DQ pairs by integer kernels
                         (QLinearSoftmax, QLinearAdd ...), which round elsewhere. Weights are
                         unpacked to float32 in memory.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.errors import ExportError, SourceError, foreign_as, listed
from qwlora.export.onnx.onnx_model import DATA_FILE, MODEL_FILE, activation_tensor
from qwlora.export.proof.contents import ADAPTER_FILE, misfits
from qwlora.export.runtime import Runtime
from qwlora.graph.capture import IDS, MASK, PAST, POSITIONS, PRESENT
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.file_stamps import Stamps, file_stamps
from qwlora.system.optional_packages import require

SESSION_OPTIONS = {"session.qdq_matmulnbits_accuracy_level": "1"}
EIGHT_BIT_OPTIONS = {"session.disable_quant_qdq": "1"}
OPTIONS_FILE = "session_options.json"
OPTIONS_FORM = SESSION_OPTIONS | EIGHT_BIT_OPTIONS


class OnnxModel(Runtime):
    """An exported model in ONNX Runtime, on the CPU.

    Args:
        folder: where the files are.
        switches: whether the model has inputs for adapters.
    """

    has_layers = True

    def __init__(self, folder: Path, switches: bool = False):
        self.folder, self.switches = folder, switches
        self._adapters: dict[Path, tuple[Stamps, Any]] = {}  # each with the options of its runs
        self._loaded: list[Any] = []
        self._options: Any = None  # of the active adapter

    @cached_property
    def session(self) -> Any:
        """The session; loaded when it is first used."""
        return open_session(self.folder / MODEL_FILE, read_session_options(self.folder))

    def use(self, adapter: Path | None) -> None:
        """Switch to the adapter in a folder, or to none.

        Raises:
            ExportError: ONNX Runtime refuses its file.
        """
        if adapter is None:
            self._options = None
            return
        file = adapter / ADAPTER_FILE
        with foreign_as(ExportError, f"ONNX Runtime cannot load {str(file)!r}"):
            stamps = file_stamps(file.stat())  # it may have been replaced
            if self._adapters.get(adapter, (None,))[0] != stamps:
                runtime = require("onnxruntime", "onnx")
                loaded, options = runtime.LoraAdapter(), runtime.RunOptions()
                loaded.Load(str(file))
                options.add_active_adapter(loaded)
                self._loaded.append(loaded)  # the options do not keep it alive
                self._adapters[adapter] = stamps, options
        self._options = self._adapters[adapter][1]

    @property
    def has_cache(self) -> bool:
        return any(value.name.startswith(f"{PAST}.") for value in self.session.get_inputs())

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every output by name, given every input by name; see the module.

        Raises:
            ExportError: ONNX Runtime refuses the files, or an input is missing.
        """
        names = [output.name for output in self.session.get_outputs()]
        return run_session(self.session, names, _completed(self.session, tensors), self._options)

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        tensors = _completed(self.session, {IDS: ids, MASK: torch.ones_like(ids)})
        return run_session(self.session, ["logits"], tensors, self._options)["logits"]

    def extend(self, ids: Tensor, past: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Run tokens after those in a cache.

        Args:
            ids: new token ids [batch, tokens].
            past: inputs of the cache by name; empty at the start.

        Returns:
            logits of the new tokens, and the cache with them after the past ones.
        """
        before = next(iter(past.values())).shape[2] if past else 0
        count = before + ids.shape[1]
        given = {
            IDS: ids,
            MASK: ids.new_ones(len(ids), count),
            POSITIONS: torch.arange(before, count).expand(ids.shape),
        }
        found = self.run({**given, **past})
        cache = {
            name.replace(PRESENT, PAST, 1): tensor
            for name, tensor in found.items()
            if name.startswith(f"{PRESENT}.")
        }
        return found["logits"], cache

    def decode(self, ids: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after token ids [1, tokens], one by one, with the cache if
        the model has one."""
        tokens, new, cache = ids, ids, dict[str, Tensor]()
        for _ in range(count):
            if self.has_cache:
                logits, cache = self.extend(new, cache)
            else:
                logits = self.logits(tokens)
            new = logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, new], dim=1)
        return tokens[0, -count:].tolist()

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every quantized activation in `values`, computed from the others in `values`.

        The graph is cut at each of them: its readers read a graph input instead, and its own value
        becomes a graph output.

        Args:
            values: the simulated value of each quantized activation.
            tensors: every input of the model by name.

        Raises:
            ExportError: ONNX Runtime refuses the files, or an input is missing.
        """
        given = {activation_tensor(name, tensors): value for name, value in values.items()}
        outputs = [f"{name}.out" for name in values]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / MODEL_FILE
            _cut_at(self.folder / MODEL_FILE, values, path)
            session = open_session(path, read_session_options(self.folder))
            tensors = _completed(session, tensors)
            found = run_session(session, outputs, {**tensors, **given}, self._options)
        return dict(zip(values, found.values(), strict=True))

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        options = read_session_options(self.folder)
        found = run_layers_of(self.folder / MODEL_FILE, options, tensors, self._options)
        return tensors, found


def write_session_options(graph: QuantizedGraph, folder: Path) -> None:
    """Write the options for `add_session_config_entry` that a session of `graph` needs."""
    eight_bits = any(
        mark.kind is Kind.ACTIVATION and graph.encodings[mark.name].scheme.bitwidth <= 8
        for mark in graph.marks
    )
    options = SESSION_OPTIONS | (EIGHT_BIT_OPTIONS if eight_bits else {})
    write_text(folder / OPTIONS_FILE, strict_json.dumps(options, indent=1) + "\n")


def read_session_options(folder: Path) -> dict[str, str]:
    """The options in `folder`, or `SESSION_OPTIONS` if there is no such file.

    Raises:
        SourceError: the file cannot be read, or has other options than `write_session_options`
            writes.
    """
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return SESSION_OPTIONS
    again = "export the model again, or copy the file again"
    with foreign_as(SourceError, f"{str(path)!r} cannot be read", again):
        options: dict[str, str] = json.loads(path.read_text())
    if problems := list(misfits(options, OPTIONS_FORM)):
        raise SourceError(f"{str(path)!r}: {listed(problems)}; {again}")
    return options


def run_layers_of(
    model: Path,
    session_options: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    options: Any = None,
) -> dict[str, Tensor]:
    """Run a QDQ model once; returns every dequantized activation by name of its tensor.

    Raises:
        ExportError: ONNX Runtime refuses the file, or an input is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / MODEL_FILE
        names = expose_activations(model, path)
        session = open_session(path, session_options)
        return run_session(session, names, _completed(session, tensors), options)


def expose_activations(source: Path, path: Path) -> list[str]:
    """Write the QDQ model in `source` with its activations as outputs; returns their names.

    Raises:
        ExportError: the file is not an ONNX model.
    """
    ir = require("onnx_ir", "onnx")
    model = load_graph(source)
    model.graph.outputs.clear()
    for node in model.graph:
        codes = node.inputs[0].producer() if node.op_type == "DequantizeLinear" else None
        if codes is not None and codes.op_type == "QuantizeLinear":
            value = node.outputs[0]
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    ir.save(model, path, external_data=DATA_FILE)
    return [value.name for value in model.graph.outputs]


def open_session(path: Path, session_options: Mapping[str, str]) -> Any:
    """An ONNX Runtime session on the CPU.

    Raises:
        ExportError: ONNX Runtime refuses the file.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    for key, value in session_options.items():
        options.add_session_config_entry(key, value)
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {error}") from error


def run_session(
    session: Any, outputs: list[str], tensors: Mapping[str, Tensor], options: Any = None
) -> dict[str, Tensor]:
    """Outputs by name; `tensors` may hold more than the session's inputs.

    Args:
        options: of ONNX Runtime, for this run; see `use`.

    Raises:
        ExportError: an input is missing, or the session refuses its adapter.
    """
    inputs = [i.name for i in session.get_inputs()]
    if missing := [name for name in inputs if name not in tensors]:
        raise ExportError(
            f"the exported model has inputs {', '.join(inputs)}; {missing[0]} was not given"
        )
    given = {name: tensors[name].numpy() for name in inputs}
    with foreign_as(ExportError, "ONNX Runtime cannot run the model"):
        found = session.run(outputs, given, options)
    return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}


def _completed(session: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` with the inputs of a whole sequence that they lack; see the module."""
    found = dict(tensors)
    for value in session.get_inputs():
        if value.name in found or IDS not in found:
            continue
        ids = found[IDS]
        if value.name == POSITIONS:
            mask = found.get(MASK, torch.ones_like(ids))
            found[POSITIONS] = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        elif value.name.startswith(f"{PAST}."):
            _, heads, _, width = value.shape
            found[value.name] = torch.zeros(len(ids), heads, 0, width)
    return found


def _cut_at(source: Path, activations: Collection[str], path: Path) -> None:
    """Write the model in `source` with its graph cut at `activations`."""
    ir = require("onnx_ir", "onnx")
    model = load_graph(source)
    computed = {output.name: output for node in model.graph for output in node.outputs}
    inputs = {value.name for value in model.graph.inputs}
    model.graph.outputs.clear()
    for name in activations:
        tensor = activation_tensor(name, inputs)
        value = computed[tensor]
        value.name = f"{name}.out"
        given = ir.Value(name=tensor, type=value.type, shape=value.shape)
        ir.convenience.replace_all_uses_with(value, given)
        if given.uses():
            model.graph.inputs.append(given)
        model.graph.outputs.append(value)
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)
    ir.save(model, path, external_data=DATA_FILE)


def load_graph(path: Path) -> Any:
    """The `onnx_ir.Model` in a file.

    Raises:
        ExportError: the file is not an ONNX model.
    """
    with foreign_as(ExportError, f"{str(path)!r} is not an ONNX model"):
        return require("onnx_ir", "onnx").load(path)
