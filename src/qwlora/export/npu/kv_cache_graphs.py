"""Run graphs with a key-value cache in ONNX Runtime: prefill in pieces, then token by token.

    graphs.json           sizes, files and grids of the graphs
    GRAPH_host.onnx       positions and mask -> cos, sin, float mask; run before each call

The cache is on the host. Valid tokens are on its right, next to the new ones.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora.errors import ExportError, foreign_as, reading
from qwlora.export.onnx.onnx_model import build_model
from qwlora.export.onnx.onnx_runtime import open_session
from qwlora.export.runtime import Runtime
from qwlora.graph.capture import IDS, MASK, POSITIONS
from qwlora.graph.device_graph import HOST_INPUTS
from qwlora.graph.kv_cache_capture import CacheSizes
from qwlora.simulation.npu_graph import NpuGraph, host_arguments
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.optional_packages import require

GRAPHS, FORMAT = "graphs.json", 1


def write_graphs(
    folder: Path,
    graphs: Mapping[str, NpuGraph],
    files: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, Any],
) -> None:
    """Write the host graphs and graphs.json.

    Args:
        files: fields of each graph in graphs.json: names of its files.
        more: fields of the record.
    """
    record: dict[str, Any] = {"format": FORMAT, "context": 0, "graphs": {}, **more}
    for name, graph in graphs.items():
        host, _ = build_model(graph.host, {})
        file = f"{name}_host.onnx"
        require("onnx_ir", "onnx").save(host, folder / file)
        record["context"] = graph.sizes.context
        record["graphs"][name] = {**_described(graph), "host": file, **files[name]}
    write_text(folder / GRAPHS, strict_json.dumps(record, indent=1) + "\n")


def _described(graph: NpuGraph) -> dict[str, Any]:
    interface, encodings = graph.device.interface, graph.device.encodings
    return {
        "tokens": graph.sizes.tokens,
        "mask_floor": graph.floor,
        "inputs": {name: list(interface.shapes[name]) for name in interface.inputs},
        "outputs": {name: list(interface.shapes[name]) for name in interface.outputs},
        "encodings": {
            name: {
                "bitwidth": encodings[name].scheme.bitwidth,
                "scale": float(encodings[name].scale),
                "offset": int(encodings[name].offset),
            }
            for name in (*interface.inputs, *interface.outputs)
            if name in encodings
        },
    }


def share_weights(model: Any, first: Path) -> list[str]:
    """Let a model read its weights from the data file of another one.

    Returns:
        names of the weights in that file that this model does not have, or has otherwise.
    """
    ir, differing = require("onnx_ir", "onnx"), []
    for name, value in ir.load(first).graph.initializers.items():
        stored, own = value.const_value, model.graph.initializers.get(name)
        if not isinstance(stored, ir.ExternalTensor):
            continue
        values = None if own is None else own.const_value
        if values is None or (values.dtype, values.tobytes()) != (stored.dtype, stored.tobytes()):
            differing.append(name)
        else:
            own.const_value = stored
    return differing


def has_graphs(folder: Path) -> bool:
    """Whether the files in a folder are graphs with a key-value cache."""
    return (folder / GRAPHS).is_file()


def most_tokens(folder: Path) -> int:
    """Tokens of a sequence that its graphs run without dropping any from the cache."""
    record = read_graphs(folder)
    context: int = record["context"]
    return context - context % max(int(graph["tokens"]) for graph in record["graphs"].values())


def read_graphs(folder: Path) -> dict[str, Any]:
    """What `graphs.json` holds: sizes, files and grids of the graphs."""
    with reading(folder / GRAPHS):
        record: dict[str, Any] = json.loads((folder / GRAPHS).read_text())
    return record


class CachedGraphs(Runtime):
    """The graphs in a folder.

    Args:
        folder: where graphs.json is.

    Attributes:
        names: of the graphs, largest first.
        tokens: new tokens of one call, by graph.
        fixed: inputs that are the same in every call.
    """

    def __init__(self, folder: Path):
        self.folder, self.record = folder, read_graphs(folder)
        self.graphs: dict[str, Any] = self.record["graphs"]
        self.context: int = self.record["context"]
        self.tokens: dict[str, int] = {n: graph["tokens"] for n, graph in self.graphs.items()}
        self.names = sorted(self.tokens, key=lambda name: -self.tokens[name])
        self._hosts = {n: open_session(folder / self.graphs[n]["host"], {}) for n in self.names}
        self.fixed: dict[str, Any] = {}

    @property
    def call_tokens(self) -> int:
        return self.tokens[self.names[0]]

    @abstractmethod
    def open(self, name: str) -> Any:
        """The session of a graph."""

    @abstractmethod
    def open_layers(self, name: str) -> tuple[Any, list[str]]:
        """A session on the CPU with every quantized activation as an output, and their names."""

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        cache = self.empty_cache()
        parts = [
            self.call_logits(name, ids[:, first : first + count], first, cache)
            for name, first, count in list(self._calls(ids.shape[1], steps))
        ]
        return torch.from_numpy(np.concatenate(parts, 1))

    def _calls(self, tokens: int, steps: int) -> Iterator[tuple[str, int, int]]:
        """(graph, tokens before, new tokens) of each call of `logits`.

        A graph that has no room for all the tokens that it takes would drop the first ones, also if
        some are padding; then the smallest one is called.
        """
        largest, smallest, first = self.names[0], self.names[-1], 0
        while first < tokens:
            left = tokens - steps - first
            fits = first + self.tokens[largest] <= self.context
            name = largest if left > 0 and fits else smallest
            if first + self.tokens[name] > self.context:
                raise ExportError(
                    f"{tokens} tokens do not fit into the context of {self.context}; give at most "
                    f"{first}, or export with a larger export.graphs.context"
                )
            count = min(self.tokens[name], left if left > 0 else tokens - first)
            yield name, first, count
            first += count

    def empty_cache(self) -> dict[str, Any]:
        """Keys and values of no token, by input name, as `call` takes them."""
        return {
            name: np.zeros((*shape[:2], self.context, shape[3]), np.float32)
            for name, shape in self.graphs[self.names[-1]]["inputs"].items()
            if name.startswith("past_")
        }

    def call_logits(self, name: str, ids: Tensor, past: int, cache: dict[str, Any]) -> Any:
        """Logits [1, tokens, vocabulary] of one call; see `call`."""
        return self.call(name, ids, past, cache)[1]["logits"][:, : ids.shape[1]]

    def call(
        self, name: str, ids: Tensor, past: int, cache: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """One call of a graph: its inputs and its outputs, by name.

        Args:
            ids: as many as the graph takes, or fewer; the rest is padded on the right.
            past: tokens before.
            cache: keys and values, valid ones on the right, at least as many as the graph takes.
                Those of the new tokens are put into it.
        """
        session = self.open(name)
        feed = self._feed(name, session, ids, past, cache)
        outputs = self._run(name, session, [o.name for o in session.get_outputs()], feed)
        for key in cache:
            new = outputs[key.replace("_in", "_out")][:, :, : ids.shape[1]]
            cache[key] = np.concatenate([cache[key], new], 2)[:, :, -self.context :]
        return feed, outputs

    def layers(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, Tensor]]:
        """One call of the largest graph, with an empty cache; see `Runtime`."""
        name, count = self.names[0], int(tensors[MASK].sum())
        session, names = self.open_layers(name)
        feed = self._feed(name, session, tensors[IDS][:, :count], 0, self.empty_cache())
        given = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in feed.items()}
        found = self._run(name, session, names, feed)
        return given, {key: torch.from_numpy(array) for key, array in found.items()}

    def _feed(
        self, name: str, session: Any, ids: Tensor, past: int, cache: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The inputs of a call, see `call`."""
        sizes, count = CacheSizes(self.tokens[name], self.context), ids.shape[1]
        mask, positions = host_arguments(sizes, past, count)
        given = {HOST_INPUTS[MASK]: mask.numpy(), HOST_INPUTS[POSITIONS]: positions.numpy()}
        host = self._hosts[name]
        wanted = [output.name for output in host.get_outputs()]
        inputs = {each.name: given[each.name] for each in host.get_inputs()}
        feed = dict(zip(wanted, host.run(wanted, inputs), strict=True))
        feed[IDS] = np.zeros((1, sizes.tokens), np.int32)
        feed[IDS][:, :count] = ids.numpy()
        feed |= {n: value[:, :, value.shape[2] - sizes.past :] for n, value in cache.items()}
        feed |= self.fixed
        names = [each.name for each in session.get_inputs()]
        if missing := [each for each in names if each not in feed]:
            raise ExportError(
                f"graph {name} in {str(self.folder)!r} has an input {missing[0]} that neither its "
                "host graph nor the adapter gives; export the bundle again"
            )
        return {each: feed[each] for each in names}

    def _run(
        self, name: str, session: Any, outputs: list[str], feed: dict[str, Any]
    ) -> dict[str, Any]:
        with foreign_as(ExportError, f"graph {name} in {str(self.folder)!r}"):
            return dict(zip(outputs, session.run(outputs, feed), strict=True))
