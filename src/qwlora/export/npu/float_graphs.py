"""Float models with a key-value cache, one for prefill and one for decode, as AIMET and QAIRT take
them.

    GRAPH_host.onnx    positions and mask -> cos, sin, float mask
    graphs.json        sizes, files and grids of the graphs; see `kv_cache_graphs.py`
    golden/GRAPH/      inputs of one call, and what ONNX Runtime computes of them

Each graph is an `NpuGraph` in the form of `float_onnx.py`, with RMSNormalization as one operator
(opset 23) and an encoding for every float tensor. Two kinds of them get one here:

    sigmoid, tanh, erf    of a value with an encoding: their range, with as many bits
    a constant c          scale |c|: c is one step

Values inside an activation function that the model makes of several operators stay without
encodings; graphs.json lists them (`float`).

All graphs have the same weights and names; tensors of one name have one encoding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora import strict_json
from qwlora.encodings.compare import encoding_differences
from qwlora.encodings.model import Entry, IntegerEncoding
from qwlora.errors import VerificationError
from qwlora.export.npu.float_onnx import FloatOnnx, TensorEncoding, to_float_onnx
from qwlora.export.npu.float_onnx_runner import OPTIONS, ROUNDED, FloatOnnxModel
from qwlora.export.npu.golden import FOLDER as GOLDEN
from qwlora.export.npu.golden import RECORD, write_array
from qwlora.export.npu.htp_rewrites import OPSET
from qwlora.export.npu.kv_cache_graphs import CachedGraphs, write_graphs
from qwlora.export.onnx.onnx_runtime import expose_activations, open_session
from qwlora.export.target import ExportedGraph
from qwlora.graph.kv_cache_capture import CacheSizes
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import encoding_from_range
from qwlora.grid.scheme import Scheme
from qwlora.messages import listed
from qwlora.simulation.kv_cache_graph import cached_graph, capture_with_cache
from qwlora.simulation.npu_graph import NpuGraph, mask_floor, npu_form
from qwlora.simulation.simulation import Simulation
from qwlora.system.optional_packages import require

_RANGES = {"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Erf": (-1.0, 1.0)}
_CONSTANT = Scheme(16, symmetric=False)


@dataclass(frozen=True)
class FloatGraph:
    """A graph as a float model.

    Args:
        npu: the graph, if it has a key-value cache.
    """

    graph: QuantizedGraph
    made: FloatOnnx
    npu: NpuGraph | None = None

    @property
    def inner(self) -> list[str]:
        """Names of the float tensors without an encoding."""
        return sorted(set(_float_tensors(self.made.model)) - self.made.encodings.keys())


def float_graphs(cases: Mapping[str, ExportedGraph], name: str) -> Iterator[tuple[str, FloatGraph]]:
    """One of the graphs of `ExportedGraph.graphs` for each use case, one at a time.

    All have one mask.

    Args:
        cases: by name; their simulations differ in tensors and encodings only.
        name: of the graph; empty for the whole model without a cache.

    Raises:
        CaptureError, CalibrationError: see `npu_graph`.
        ExportError, MissingExtraError: see `to_float_onnx`.
    """
    for case, (graph, npu) in _graphs(cases, name).items():
        if npu is None:
            simulation = cases[case].simulation
            inputs = simulation.bind(cases[case].sample)
            made = to_float_onnx(graph, inputs)
        else:
            shapes = graph.interface.shapes
            inputs = {each: torch.zeros([int(n) for n in shapes[each]]) for each in graph.inputs}
            made = to_float_onnx(graph, inputs, OPSET)
            _encode_rest(made)
        made.model.metadata_props.update(cases[case].metadata)
        yield case, FloatGraph(graph, made, npu)


def _graphs(
    cases: Mapping[str, ExportedGraph], name: str
) -> dict[str, tuple[QuantizedGraph, NpuGraph | None]]:
    if not name:
        return {case: (exported.simulation.graph(), None) for case, exported in cases.items()}
    first = next(iter(cases.values()))
    sizes = CacheSizes(first.graphs[name], first.context)
    captured = capture_with_cache(_simulation(first), sizes, "new")
    cached = {case: cached_graph(_simulation(own), captured) for case, own in cases.items()}
    floor = min(mask_floor(graph) for graph in cached.values())
    forms = {case: npu_form(graph, sizes, floor, None) for case, graph in cached.items()}
    return {case: (npu.device, npu) for case, npu in forms.items()}


def _simulation(exported: ExportedGraph) -> Simulation:
    assert isinstance(exported.simulation, Simulation)
    return exported.simulation


def _encode_rest(made: FloatOnnx) -> None:
    """Encodings of bounded functions and of constants."""
    graph, encodings = made.model.graph, made.encodings
    for node in graph:
        value = node.outputs[0]
        if (
            node.op_type in _RANGES
            and value.name not in encodings
            and node.inputs[0].name in encodings
        ):
            low, high = (torch.tensor(end) for end in _RANGES[node.op_type])
            bits = encodings[node.inputs[0].name].encoding.scheme.bitwidth
            scheme = Scheme(bits, symmetric=False)
            encodings[value.name] = TensorEncoding(encoding_from_range(low, high, scheme))
    for name in _float_tensors(made.model):
        if name in graph.initializers and name not in encodings:
            number = torch.from_numpy(np.array(graph.initializers[name].const_value.numpy()))
            if number.numel() == 1 and float(number):
                offset = torch.tensor(0 if float(number) > 0 else -1)
                grid = Encoding(_CONSTANT, number.abs().reshape(()), offset)
                encodings[name] = TensorEncoding(grid, parameter=True)


def _float_tensors(model: Any) -> Iterator[str]:
    """Names of the float tensors that the graph reads, computes or stores."""
    floats = require("onnx_ir", "onnx").DataType.FLOAT
    graph = model.graph
    computed = (value for node in graph for value in node.outputs)
    for value in (*graph.inputs, *graph.initializers.values(), *computed):
        if value.dtype == floats:
            yield value.name


def write_float_graphs(
    folder: Path,
    graphs: Mapping[str, tuple[NpuGraph, list[str]]],
    files: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write the host graphs and graphs.json.

    Args:
        graphs: each with the names of its float tensors without an encoding.
        files: fields of each graph in graphs.json: names of its files.
    """
    inner = {name: names for name, (_, names) in graphs.items()}
    write_graphs(folder, {name: npu for name, (npu, _) in graphs.items()}, files, {"float": inner})


class FloatGraphs(CachedGraphs):
    """Float models with a cache in ONNX Runtime on the CPU.

    Args:
        folder: where graphs.json is.
        models: by name of the graph.
    """

    def __init__(self, folder: Path, models: Mapping[str, FloatOnnxModel]):
        super().__init__(folder)
        self.models = models

    def open(self, name: str) -> Any:
        return self.models[name].session

    def open_layers(self, name: str) -> tuple[Any, list[str]]:
        with tempfile.TemporaryDirectory() as scratch:
            parts = [Path(scratch) / part for part in ("whole", "exposed")]
            for part in parts:
                part.mkdir()
            path = parts[1] / "model.onnx"
            names = expose_activations(self.models[name].with_grids(parts[0]), path)
            return open_session(path, OPTIONS), names

    def layers(self, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        given, found = super().layers(ids)
        return given, {name.removesuffix(ROUNDED): value for name, value in found.items()}

    def check(self) -> None:
        """Check every promise of the files.

        Raises:
            VerificationError: see `FloatOnnxModel.check` and `problems`. All are listed.
        """
        found: list[str] = []
        for name in self.names:
            try:
                self.models[name].check()
            except VerificationError as error:
                found += error.problems
        if found := found or list(self.problems()):
            raise VerificationError(f"{self.folder}: the files contradict each other", found)

    def problems(self) -> Iterator[str]:
        """Float tensors without an encoding, and what differs between the graphs, or from
        graphs.json."""
        for name in self.names:
            yield from self._graph_problems(name)
        yield from self._untied()

    def _graph_problems(self, name: str) -> Iterator[str]:
        model, record = self.models[name], self.record["graphs"][name]
        known, where = model.file.by_name, model.encodings.relative_to(self.folder)
        loaded = require("onnx_ir", "onnx").load(model.model)
        for side, values in (("inputs", loaded.graph.inputs), ("outputs", loaded.graph.outputs)):
            found = {value.name: [int(n) for n in value.shape] for value in values}
            if found != record[side]:
                differing = [
                    n for n in {**found, **record[side]} if found.get(n) != record[side].get(n)
                ]
                file = model.model.relative_to(self.folder)
                yield f"{file}: {listed(differing, 3)} differ from {side} of {name} in graphs.json"
        inner = set(self.record["float"][name])
        bare = [n for n in _float_tensors(loaded) if n not in known and n not in inner]
        if bare:
            yield f"{where}: {listed(bare, 3)} {'has' if len(bare) == 1 else 'have'} no entry"
        for each, grid in record["encodings"].items():
            if _grid(known.get(each)) != grid:
                yield f"{where}: the entry of {each} differs from graphs.json"
        for each in record["inputs"]:
            new = each.replace("_in", "_out")
            if new in record["outputs"] and _grid(known.get(each)) != _grid(known.get(new)):
                yield f"{where}: {each} and {new} have different entries"

    def _untied(self) -> Iterator[str]:
        """Tensors of one name with different encodings."""
        first, *others = self.names
        known = self.models[first].file.by_name
        for other in others:
            model = self.models[other]
            where = model.encodings.relative_to(self.folder)
            for each, entry in model.file.by_name.items():
                if each in known and encoding_differences(known[each], entry):
                    yield f"{where}: the entry of {each} differs from that of graph {first}"


def _grid(entry: Entry | None) -> dict[str, float] | None:
    """An entry as graphs.json has it."""
    if not isinstance(entry, IntegerEncoding) or entry.scale.size != 1:
        return None
    scale, offset = np.float32(entry.scale.item()), int(entry.offset.item())
    return {"bitwidth": entry.bitwidth, "scale": float(scale), "offset": offset}


def write_graph_golden(graphs: FloatGraphs, ids: Tensor, folder: Path, case: str = "") -> None:
    """Write one call of each graph, as `.npy` files: the largest on the first tokens, the others
    on those after it.

    Args:
        ids: [1, tokens], at least one for each graph.
    """
    cache, past = graphs.empty_cache(), 0
    for number, name in enumerate(graphs.names):
        left = ids.shape[1] - past - (len(graphs.names) - 1 - number)
        count = min(int(graphs.record["graphs"][name]["tokens"]), left)
        golden = folder / GOLDEN / case / name
        golden.mkdir(parents=True)
        feed, outputs = graphs.call(name, ids[:, past : past + count], past, cache)
        record = {
            role: [write_array(golden, n, torch.from_numpy(np.array(v))) for n, v in values.items()]
            for role, values in (("inputs", feed), ("outputs", outputs))
        }
        (golden / RECORD).write_text(strict_json.dumps(record, indent=1) + "\n")
        graphs.keep(outputs, cache, count)
        past += count
