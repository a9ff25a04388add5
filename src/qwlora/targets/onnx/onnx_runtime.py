"""Run an exported ONNX model, as a whole or layer by layer.

A model with a key-value cache has inputs that a simulation does not have. Those that are not given
are those of a whole sequence:

    past_key_values.N.key, .value    without tokens
    position_ids                     0, 1, 2, ... from the first token that attention_mask shows
    inputs_embeds                    of input_ids, by the table next to the model

Without the options of ONNX Runtime below, a quantized model computes something else. They are
exported with it, and a file with other options is refused.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwlora.errors import ExportError, SourceError, foreign_as, listed
from qwlora.graph.call_arguments import vocabulary_size
from qwlora.graph.capture import EMBEDS, IDS, MASK, PAST, POSITIONS, PRESENT, token_places
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.simulation.simulation import Simulation
from qwlora.system import strict_json
from qwlora.system.atomic import read_tensors, write_tensors, write_text
from qwlora.system.device import device_of
from qwlora.system.optional_packages import require
from qwlora.targets.onnx.onnx_model import (
    MODEL_FILE,
    activation_tensor,
    load_graph,
    remove_unused,
    save_graph,
)
from qwlora.targets.proof.contents import ADAPTER_FILE, misfits
from qwlora.targets.target import Runtime

SESSION_OPTIONS = {
    # By default, it quantizes the activations of 4-bit weights to 8 bits: an error of 3e-2.
    "session.qdq_matmulnbits_accuracy_level": "1",
    # It gives the float bias of a convolution int32 steps of scale(x) * scale(w). With weights and
    # activations of 16 bits, ONNX Runtime 1.32 overflows (0.30 for 0.50, docs/log/runtimes.md).
    "optimization.disable_specified_optimizers": "WeightBiasQuantization",
}
# For 8-bit activations: integer kernels (QLinearSoftmax, QLinearAdd ...) in place of Q/DQ pairs
# round elsewhere, and the bits of the base depend on whether an adapter has run before. The price
# is memory: weights are unpacked to float32.
EIGHT_BIT_OPTIONS = {"session.disable_quant_qdq": "1"}
OPTIONS_FILE = "session_options.json"
EMBEDDINGS_FILE = "token_embeddings.safetensors"
_AGAIN = "export the model again, or copy the file again"
OPTIONS_FORM = SESSION_OPTIONS | EIGHT_BIT_OPTIONS


class OnnxModel(Runtime):
    """An exported QDQ model in ONNX Runtime, on the CPU. `switches`: it has inputs for adapters."""

    has_layers = True

    def __init__(self, folder: Path, switches: bool = False):
        self.folder, self.switches = folder, switches
        # by folder: the adapter, which its options do not keep alive, and the options of its runs
        self._adapters: dict[Path | None, tuple[Any, Any]] = {None: (None, None)}
        self._options: Any = None  # of the active adapter

    @cached_property
    def session(self) -> Any:
        return open_session(self.folder / MODEL_FILE, self.session_options)

    @property
    def session_options(self) -> Mapping[str, str]:
        return read_session_options(self.folder)

    def load(self) -> Any:
        return load_graph(self.folder / MODEL_FILE)

    def switch_to(self, adapter: Path | None) -> None:
        if adapter is not None and adapter not in self._adapters:
            file, runtime = adapter / ADAPTER_FILE, require("onnxruntime", "onnx")
            with foreign_as(ExportError, f"ONNX Runtime cannot load {str(file)!r}"):
                loaded, options = runtime.LoraAdapter(), runtime.RunOptions()
                loaded.Load(str(file))
                options.add_active_adapter(loaded)
            self._adapters[adapter] = loaded, options
        self._options = self._adapters[adapter][1]

    @property
    def has_cache(self) -> bool:
        return any(value.name.startswith(f"{PAST}.") for value in self.session.get_inputs())

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return run_session(self.session, embedded(tensors, self.folder), self._options)

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        tensors = embedded({IDS: ids, MASK: torch.ones_like(ids)}, self.folder)
        return run_session(self.session, tensors, self._options, ["logits"])["logits"]

    def extend(self, ids: Tensor, past: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.has_cache:
            return super().extend(ids, past)
        before = next(iter(past.values())).shape[2] if past else 0
        count = before + ids.shape[1]
        outputs = self.run({IDS: ids, MASK: ids.new_ones(len(ids), count), **past})
        cache = {
            name.replace(PRESENT, PAST, 1): tensor
            for name, tensor in outputs.items()
            if name.startswith(f"{PRESENT}.")
        }
        return outputs["logits"], cache

    def run_layers(
        self, values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        simulated = {activation_tensor(name, tensors): value for name, value in values.items()}
        model = self.load()
        _cut_at_(model, simulated)
        session = open_model(model, self.session_options)
        computed = run_session(session, {**tensors, **simulated}, self._options)
        return dict(zip(values, computed.values(), strict=True))


def write_embeddings(simulation: Simulation, folder: Path) -> None:
    """Write the embedding of each token, [vocabulary, width], if the graph takes embeddings."""
    # A runtime looks up text in it, and puts what an image becomes between.
    if (embeddings := simulation.captured.embeddings) is not None:
        with torch.no_grad():
            count = vocabulary_size(simulation.origin.model)
            rows = embeddings(torch.arange(count, device=device_of(embeddings)))
        write_tensors(folder / EMBEDDINGS_FILE, {EMBEDS: rows.float().cpu()})


def embedded(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Inputs of a model in `folder`, with the embeddings of token ids if it takes these."""
    path = folder / EMBEDDINGS_FILE
    if IDS not in tensors or EMBEDS in tensors or not path.is_file():
        return dict(tensors)
    with foreign_as(SourceError, f"{str(path)!r} cannot be read", _AGAIN):
        rows = _rows(path, path.stat().st_mtime_ns)
    return {**tensors, EMBEDS: rows[tensors[IDS].long()]}


# One table can have a gigabyte. The time of the file is a key, since it may be exported again.
@lru_cache(maxsize=1)
def _rows(path: Path, _: int) -> Tensor:
    return read_tensors(path)[0][EMBEDS]


def write_session_options(graph: QuantizedGraph, folder: Path) -> None:
    """Write the options for `add_session_config_entry` that a session of `graph` needs."""
    eight_bits = min(graph.activation_bitwidths, default=16) <= 8
    options = SESSION_OPTIONS | (EIGHT_BIT_OPTIONS if eight_bits else {})
    write_text(folder / OPTIONS_FILE, strict_json.dumps(options, indent=1) + "\n")


def read_session_options(folder: Path) -> dict[str, str]:
    """The options in `folder`, or `SESSION_OPTIONS` if there is no such file."""
    path = folder / OPTIONS_FILE
    if not path.is_file():
        return SESSION_OPTIONS
    with foreign_as(SourceError, f"{str(path)!r} cannot be read", _AGAIN):
        options: dict[str, str] = json.loads(path.read_text())
    if problems := list(misfits(options, OPTIONS_FORM)):
        raise SourceError(f"{str(path)!r}: {listed(problems)}; {_AGAIN}")
    return options


def open_session(
    path: Path,
    entries: Mapping[str, str],
    is_optimized: bool = True,
    profile: Path | None = None,
    device: tuple[list[Any], Mapping[str, str]] | None = None,
) -> Any:
    """An ONNX Runtime session with these `entries` of its configuration.

    Args:
        profile: prefix of a file that tells what ran where.
        device: devices and options of their provider. Default: the CPU.
    """
    runtime = require("onnxruntime", "onnx")
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # errors are raised
    # ONNX Runtime would take all cores, also where the user gave torch fewer.
    options.intra_op_num_threads = torch.get_num_threads()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if not is_optimized:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if device is not None:
        options.add_provider_for_devices(*device)
    providers = ["CPUExecutionProvider"] if device is None else None
    with foreign_as(ExportError, f"ONNX Runtime cannot load {str(path)!r}"):
        return runtime.InferenceSession(str(path), options, providers=providers)


def open_model(model: Any, entries: Mapping[str, str], is_optimized: bool = True) -> Any:
    """A session of an `onnx_ir.Model` on the CPU; see `open_session`."""
    # Through a file, since a protobuf message has at most 2 GiB.
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, MODEL_FILE)
        save_graph(model, path)
        return open_session(path, entries, is_optimized)


def run_session(
    session: Any,
    tensors: Mapping[str, Tensor],
    options: Any = None,
    outputs: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Outputs by name.

    Args:
        tensors: by name, perhaps more than the session's inputs; see the module for those that may
            be missing.
        options: of ONNX Runtime, for this run: the active adapter.
        outputs: names. Default: all.
    """
    tensors, shapes = dict(tensors), {i.name: i.shape for i in session.get_inputs()}
    if (ids := token_places(tensors, IDS)) is not None:
        for name in shapes.keys() - tensors.keys():
            if name == POSITIONS:
                mask = tensors.get(MASK, torch.ones_like(ids))
                # Qwen2-VL has three axes of positions, which are equal for text.
                counted = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
                tensors[name] = counted.expand([3, -1, -1][-len(shapes[name]) :])
            elif name.startswith(f"{PAST}."):
                tensors[name] = torch.zeros(len(ids), shapes[name][1], 0, shapes[name][3])
    if missing := [name for name in shapes if name not in tensors]:
        raise ExportError(
            f"the exported model has inputs {', '.join(shapes)}; {missing[0]} was not given"
        )
    feed = {name: tensors[name].numpy() for name in shapes}
    names = outputs or [output.name for output in session.get_outputs()]
    with foreign_as(ExportError, "ONNX Runtime cannot run the model"):
        arrays = session.run(names, feed, options)
    return {name: torch.from_numpy(value) for name, value in zip(names, arrays, strict=True)}


def _cut_at_(model: Any, activations: Collection[str]) -> None:
    """Cut the graph at tensors: each becomes an input, and what computed it the output
    `TENSOR.out`."""
    # Each layer then gets the simulation's own input, so differences do not add up.
    ir = require("onnx_ir", "onnx")
    computed = {output.name: output for node in model.graph for output in node.outputs}
    model.graph.outputs.clear()
    for tensor in activations:
        value = computed[tensor]
        value.name = f"{tensor}.out"
        read = ir.Value(name=tensor, type=value.type, shape=value.shape)
        value.replace_all_uses_with(read)
        if read.uses():
            model.graph.inputs.append(read)
        model.graph.outputs.append(value)
    remove_unused(model)
