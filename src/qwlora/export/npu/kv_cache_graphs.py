"""Run graphs with a key-value cache in ONNX Runtime: prefill in pieces, then token by token.

    graphs.json           sizes, files and grids of the graphs
    GRAPH_host.onnx       positions and mask -> cos, sin, float mask; run before each call

The cache is on the host. Valid tokens are on its right, next to the new ones.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora import strict_json
from qwlora.atomic import write_text
from qwlora.errors import ExportError, reading
from qwlora.export.onnx.onnx_model import build_model
from qwlora.export.onnx.onnx_runtime import open_session
from qwlora.export.runtime import Runtime
from qwlora.graph.host_graph import HOST_INPUTS
from qwlora.graph.kv_cache_capture import MASK, POSITIONS, CacheSizes
from qwlora.grid.encoding import Encoding
from qwlora.simulation.npu_graph import NpuGraph, host_arguments
from qwlora.system.optional_packages import require

GRAPHS, FORMAT = "graphs.json", 1


def write_graphs(
    folder: Path,
    made: Mapping[str, NpuGraph],
    files: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, Any],
) -> None:
    """Write the host graphs and graphs.json.

    Args:
        files: fields of each graph in graphs.json: names of its files.
        more: fields of the record.
    """
    graphs = {}
    for name, graph in made.items():
        host, _ = build_model(graph.host, {})
        require("onnx_ir", "onnx").save(host, folder / _host_file(name))
        graphs[name] = {**_described(graph), "host": _host_file(name), **files[name]}
    context = next(iter(made.values())).sizes.context
    record = {"format": FORMAT, "context": context, "graphs": graphs, **more}
    write_text(folder / GRAPHS, strict_json.dumps(record, indent=1) + "\n")


def _host_file(name: str) -> str:
    return f"{name}_host.onnx"


def _described(graph: NpuGraph) -> dict[str, Any]:
    interface = graph.device.interface
    grids = {}
    for each in (*interface.inputs, *interface.outputs):
        encoding = graph.device.encodings.get(each)
        if isinstance(encoding, Encoding):
            grids[each] = {
                "bitwidth": encoding.scheme.bitwidth,
                "scale": float(encoding.scale),
                "offset": int(encoding.offset),
            }
    return {
        "tokens": graph.sizes.tokens,
        "mask_floor": graph.floor,
        "inputs": {each: list(interface.shapes[each]) for each in interface.inputs},
        "outputs": {each: list(interface.shapes[each]) for each in interface.outputs},
        "encodings": grids,
    }


def has_graphs(folder: Path) -> bool:
    """Whether the files in a folder are graphs with a key-value cache."""
    return (folder / GRAPHS).is_file()


def most_tokens(folder: Path) -> int:
    """Tokens of a sequence that its graphs run without dropping any from the cache."""
    record = read_graphs(folder)
    context: int = record["context"]
    return context - context % _largest_call(record)


def read_graphs(folder: Path) -> dict[str, Any]:
    """What `graphs.json` holds: sizes, files and grids of the graphs.

    Raises:
        SourceError: it cannot be read.
    """
    with reading(folder / GRAPHS):
        record: dict[str, Any] = json.loads((folder / GRAPHS).read_text())
    return record


def _largest_call(record: Mapping[str, Any]) -> int:
    return max(int(graph["tokens"]) for graph in record["graphs"].values())


class CachedGraphs(ABC):
    """The graphs in a folder.

    Args:
        folder: where graphs.json is.

    Raises:
        ExportError, SourceError: the files cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.record = read_graphs(folder)
        graphs = self.record["graphs"]
        self.names = sorted(graphs, key=lambda name: -graphs[name]["tokens"])
        self._hosts = {n: open_session(folder / graphs[n]["host"], {}) for n in self.names}
        self.fixed: dict[str, Any] = {}  # inputs that are the same in every call

    @abstractmethod
    def open(self, name: str) -> Any:
        """The session of a graph.

        Raises:
            ExportError: ONNX Runtime refuses it.
        """

    @abstractmethod
    def open_layers(self, name: str) -> tuple[Any, list[str]]:
        """A session on the CPU with every quantized activation as an output, and their names.

        Raises:
            ExportError: ONNX Runtime refuses it.
        """

    @torch.no_grad()
    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        """Logits [1, tokens, vocabulary] of ids [1, tokens].

        Args:
            steps: the last tokens to run one by one, by the smallest graph.
        """
        cache = self.empty_cache()
        found = [
            self.extend(name, ids[:, first : first + count], first, cache)
            for name, first, count in self._calls(ids.shape[1], steps)
        ]
        return torch.from_numpy(np.concatenate(found, 1))

    def _calls(self, tokens: int, steps: int) -> list[tuple[str, int, int]]:
        """(graph, tokens before, new tokens) of each call of `logits`.

        A graph that has no room for all the tokens that it takes would drop the first ones, also if
        some are padding; then the smallest one is called.
        """
        room = self.record["context"]
        sizes = {name: self.record["graphs"][name]["tokens"] for name in self.names}
        largest, smallest = self.names[0], self.names[-1]
        calls, first = list[tuple[str, int, int]](), 0
        while first < tokens:
            left = tokens - steps - first
            name = largest if left > 0 and first + sizes[largest] <= room else smallest
            if first + sizes[name] > room:
                raise ExportError(
                    f"{tokens} tokens do not fit into the context of {room}; give at most {first}, "
                    "or export with a larger export.graphs.context"
                )
            count = min(sizes[name], left if left > 0 else tokens - first)
            calls.append((name, first, count))
            first += count
        return calls

    def empty_cache(self) -> dict[str, Any]:
        """Keys and values of no token, by input name, as `extend` takes them."""
        room = self.record["context"]
        return {
            name: np.zeros((*shape[:2], room, shape[3]), np.float32)
            for name, shape in self.record["graphs"][self.names[-1]]["inputs"].items()
            if name.startswith("past_")
        }

    def extend(self, name: str, ids: Tensor, past: int, cache: dict[str, Any]) -> Any:
        """Logits [1, tokens, vocabulary] of one call, whose keys and values go into `cache`.

        Args:
            name, ids, past: see `call`.
        """
        count = ids.shape[1]
        _, outputs = self.call(name, ids, past, cache)
        self.keep(outputs, cache, count)
        return outputs["logits"][:, :count]

    def keep(self, outputs: Mapping[str, Any], cache: dict[str, Any], count: int) -> None:
        """Put the keys and values of `count` new tokens into `cache`."""
        room = self.record["context"]
        for each in cache:
            new = outputs[each.replace("_in", "_out")][:, :, :count]
            cache[each] = np.concatenate([cache[each], new], 2)[:, :, -room:]

    def call(
        self, name: str, ids: Tensor, past: int, cache: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One call of a graph: its inputs and its outputs, by name.

        Args:
            ids: as many as the graph takes, or fewer; the rest is padded on the right.
            past: tokens before.
            cache: keys and values, valid ones on the right, at least as many as the graph takes.
        """
        session = self.open(name)
        feed = self._feed(name, session, ids, past, cache)
        outputs = [output.name for output in session.get_outputs()]
        return feed, dict(zip(outputs, self._run(name, session, outputs, feed), strict=True))

    def layers(self, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One call of the largest graph, with an empty cache, on the CPU.

        Args:
            ids: as many as the graph takes, or fewer; see `call`.

        Returns:
            its inputs by name, and every quantized activation by name of the tensor.
        """
        name = self.names[0]
        session, names = self.open_layers(name)
        feed = self._feed(name, session, ids, 0, self.empty_cache())
        values = zip(names, self._run(name, session, names, feed), strict=True)
        given = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in feed.items()}
        return given, {key: torch.from_numpy(array) for key, array in values}

    def layers_of(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """`layers` of the inputs of a simulation, padded on the right."""
        count = int(tensors["attention_mask"].sum())
        return self.layers(tensors["input_ids"][:, :count])

    def _feed(
        self, name: str, session: Any, ids: Tensor, past: int, cache: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The inputs of a call, see `call`."""
        graph = self.record["graphs"][name]
        sizes, count = CacheSizes(graph["tokens"], self.record["context"]), ids.shape[1]
        mask, positions = host_arguments(sizes, past, count)
        given = {HOST_INPUTS[MASK]: mask.numpy(), HOST_INPUTS[POSITIONS]: positions.numpy()}
        host = self._hosts[name]
        wanted = [output.name for output in host.get_outputs()]
        taken = [each.name for each in host.get_inputs()]
        feed = dict(zip(wanted, host.run(wanted, {n: given[n] for n in taken}), strict=True))
        feed["input_ids"] = np.zeros((1, sizes.tokens), np.int32)
        feed["input_ids"][:, :count] = ids.numpy()
        feed |= {n: value[:, :, value.shape[2] - sizes.past :] for n, value in cache.items()}
        feed |= self.fixed
        inputs = [each.name for each in session.get_inputs()]
        if missing := [each for each in inputs if each not in feed]:
            raise ExportError(
                f"graph {name} in {str(self.folder)!r} has an input {missing[0]} that neither its "
                "host graph nor the adapter gives; export the bundle again"
            )
        return {each: feed[each] for each in inputs}

    def _run(self, name: str, session: Any, outputs: list[str], feed: Mapping[str, Any]) -> Any:
        try:
            return session.run(outputs, dict(feed))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise ExportError(f"graph {name} in {str(self.folder)!r}: {error}") from error


class GraphsRuntime(Runtime):
    """Graphs with a key-value cache, of one adapter or use case."""

    def __init__(self, graphs: CachedGraphs):
        self.graphs = graphs

    @property
    def call_tokens(self) -> int:
        return _largest_call(self.graphs.record)

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        return self.graphs.logits(ids, steps)

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        return self.graphs.layers_of(tensors)
