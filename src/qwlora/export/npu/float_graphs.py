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

from qwlora.errors import VerificationError, listed
from qwlora.export.npu.float_onnx import FloatOnnx, TensorEncoding, to_float_onnx
from qwlora.export.npu.float_onnx_runner import OPTIONS, ROUNDED, FloatOnnxModel
from qwlora.export.npu.golden import FOLDER as GOLDEN
from qwlora.export.npu.golden import write_golden
from qwlora.export.npu.htp_rewrites import OPSET
from qwlora.export.npu.kv_cache_graphs import CachedGraphs
from qwlora.export.onnx.onnx_runtime import expose_activations, open_session
from qwlora.export.target import ExportedGraph
from qwlora.formats.aimet_encodings.compare import encoding_differences
from qwlora.formats.aimet_encodings.model import Entry, IntegerEncoding
from qwlora.graph.kv_cache_capture import CacheSizes
from qwlora.graph.quantized_graph import QuantizedGraph
from qwlora.grid.encoding import Encoding
from qwlora.grid.min_max import encoding_from_range
from qwlora.grid.scheme import Scheme
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
    """
    npus = _npu_graphs(cases, name) if name else {}
    for case, exported in cases.items():
        npu = npus.get(case)
        if npu is None:
            graph = exported.simulation.graph()
            made = to_float_onnx(graph, exported.simulation.bind(exported.sample))
        else:
            graph, shapes = npu.device, npu.device.interface.shapes
            inputs = {each: torch.zeros([int(n) for n in shapes[each]]) for each in graph.inputs}
            made = to_float_onnx(graph, inputs, OPSET)
            _encode_rest(made)
        made.model.metadata_props.update(exported.metadata)
        yield case, FloatGraph(graph, made, npu)


def _npu_graphs(cases: Mapping[str, ExportedGraph], name: str) -> dict[str, NpuGraph]:
    simulations = dict[str, Simulation]()
    for case, exported in cases.items():
        assert isinstance(exported.simulation, Simulation)
        simulations[case] = exported.simulation
    first = next(iter(cases))
    sizes = CacheSizes(cases[first].graphs[name], cases[first].context)
    captured = capture_with_cache(simulations[first], sizes, "new")
    cached = {case: cached_graph(own, captured) for case, own in simulations.items()}
    floor = min(mask_floor(graph) for graph in cached.values())
    return {case: npu_form(graph, sizes, floor, None) for case, graph in cached.items()}


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
        with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as exposed:
            path = Path(exposed) / "model.onnx"
            names = expose_activations(self.models[name].with_grids(Path(whole)), path)
            return open_session(path, OPTIONS), names

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        inputs, layers = super().layers(tensors)
        return inputs, {name.removesuffix(ROUNDED): value for name, value in layers.items()}

    def check(self) -> None:
        """Check every promise of the files."""
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
        first, *others = self.names
        shared = self.models[first].file.by_name
        for other in others:
            for each, entry in self.models[other].file.by_name.items():
                if each in shared and encoding_differences(shared[each], entry):
                    where = self._path(self.models[other].encodings)
                    yield f"{where}: the entry of {each} differs from that of graph {first}"

    def _path(self, file: Path) -> Path:
        return file.relative_to(self.folder)

    def _graph_problems(self, name: str) -> Iterator[str]:
        model, record = self.models[name], self.graphs[name]
        known, where = model.file.by_name, self._path(model.encodings)
        loaded = require("onnx_ir", "onnx").load(model.model)
        for side, values in (("inputs", loaded.graph.inputs), ("outputs", loaded.graph.outputs)):
            shapes, wanted = {v.name: [int(n) for n in v.shape] for v in values}, record[side]
            if differing := [n for n in {**shapes, **wanted} if shapes.get(n) != wanted.get(n)]:
                file, names = self._path(model.model), listed(differing, 3)
                yield f"{file}: {names} differ from {side} of {name} in graphs.json"
        inner = {*known, *self.record["float"][name]}
        if bare := [each for each in _float_tensors(loaded) if each not in inner]:
            yield f"{where}: {listed(bare, 3)} {'has' if len(bare) == 1 else 'have'} no entry"
        for each, grid in record["encodings"].items():
            if _grid(known.get(each)) != grid:
                yield f"{where}: the entry of {each} differs from graphs.json"
        for each in record["inputs"]:
            new = each.replace("_in", "_out")
            if new in record["outputs"] and _grid(known.get(each)) != _grid(known.get(new)):
                yield f"{where}: {each} and {new} have different entries"


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
    for following, name in zip(reversed(range(len(graphs.names))), graphs.names, strict=True):
        count = min(graphs.tokens[name], ids.shape[1] - past - following)
        call = graphs.call(name, ids[:, past : past + count], past, cache)
        feed, outputs = (
            {n: torch.from_numpy(np.array(v)) for n, v in side.items()} for side in call
        )
        write_golden(folder / GOLDEN / case / name, feed, outputs)
        past += count
