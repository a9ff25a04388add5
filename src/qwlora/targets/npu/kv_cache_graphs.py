"""A folder of graphs with a key-value cache: written with golden outputs, and run in ONNX Runtime,
prefill in pieces, then token by token. A model that is no causal language model has one graph,
`forward`, without a cache. Its host computes what depends on integers and masks.

    graphs.json           sizes, files and grids of the graphs
    GRAPH_host.onnx       positions and mask -> cos, sin, float mask; run before each call
    golden/GRAPH/         inputs of one call, and what ONNX Runtime computes of them; for a model
                          without a cache golden/, a batch and what the simulation computes of it
      input_ids.npy ...   every input and output of the graph, with its type
      golden.json         name, role, type, shape and SHA-256 of each
    token_embeddings.safetensors    where graphs take embeddings instead of token ids

The cache is on the host. Valid tokens are on its right, next to the new ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from qwlora.errors import ExportError, reading
from qwlora.graph.capture import EMBEDS, IDS, MASK, POSITIONS
from qwlora.simulation.kv_cache_graph import Batch, CacheSizes
from qwlora.system import strict_json
from qwlora.system.atomic import write_text
from qwlora.system.optional_packages import require
from qwlora.targets.npu.device_graph import ALPHA, COS, HOST_INPUTS, SIN, host_input
from qwlora.targets.npu.genie import GENIE, to_codes, to_values
from qwlora.targets.npu.npu_graph import NpuGraph, host_arguments
from qwlora.targets.onnx.onnx_model import build_model, load_graph, save_graph
from qwlora.targets.onnx.onnx_runtime import OnnxModel, embedded, open_session, run_session
from qwlora.targets.target import ExportedGraph, Runtime

GRAPHS, FORMAT, GOLDEN = "graphs.json", 1, "golden"
FORWARD = "forward"  # the name of a graph without a cache


def graph_sizes(exported: ExportedGraph) -> dict[str, CacheSizes | Batch]:
    """The graphs to write by name: sizes of those with a cache, or the batch whose shapes the only
    one has."""
    if exported.graphs:
        # The largest is first: its file has the shared weights, Genie's configuration its sizes.
        largest_first = sorted(exported.graphs, key=lambda s: (-s.tokens, -s.context))
        # Genie takes sizes from shapes, and tells graphs of one size apart by this suffix.
        suffix = "_1_of_1" if exported.layout == GENIE else ""
        return {f"{sizes.name}{suffix}": sizes for sizes in largest_first}
    if not exported.sample:
        raise ExportError(
            "the model is not a causal language model, and an NPU takes fixed shapes. Give "
            "`sample`: one batch of its inputs, of the shapes that the graph will have"
        )
    return {FORWARD: exported.sample}


def write_graphs(
    folder: Path,
    graphs: Mapping[str, NpuGraph],
    files: Mapping[str, Mapping[str, Any]],
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write the host graphs and graphs.json. `files` has fields of each graph in graphs.json (names
    of its files, or other grids), `more` has fields of the record."""
    record: dict[str, Any] = {"format": FORMAT, "graphs": {}, **(more or {})}
    for name, graph in graphs.items():
        interface, encodings = graph.device.interface, graph.device.encodings
        file = f"{name}_host.onnx" if graph.host.interface.outputs else None
        if file:
            save_graph(build_model(graph.host, {})[0], folder / file, data=None)
        sizes = graph.cache
        sized = {"tokens": sizes.tokens, "context": sizes.context} if sizes else {}
        record["graphs"][name] = {
            **sized,
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
            "host": file,
            **files[name],
        }
    write_text(folder / GRAPHS, strict_json.dumps(record, indent=1) + "\n")


def share_weights(model: Any, first: Path) -> list[str]:
    """Let a model read its weights from the data file of another one; returns the names of the
    weights in that file that this model does not have, or has otherwise."""
    differing, external = [], require("onnx_ir", "onnx").ExternalTensor
    for name, value in load_graph(first).graph.initializers.items():
        stored, initializer = value.const_value, model.graph.initializers.get(name)
        if not isinstance(stored, external):
            continue
        values = None if initializer is None else initializer.const_value
        if values is None or (values.dtype, values.tobytes()) != (stored.dtype, stored.tobytes()):
            differing.append(name)
        else:
            initializer.const_value = stored
    return differing


def write_golden(folder: Path, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Write one batch and its outputs into a new folder."""
    # For SQNR and the likeliest token: no device equals these bit for bit (noise floor).
    folder.mkdir(parents=True)
    record: dict[str, list[Any]] = {"inputs": [], "outputs": []}
    for role, tensors in zip(record, (inputs, outputs), strict=True):
        for name, tensor in tensors.items():
            path, array = folder / f"{name}.npy", tensor.detach().cpu().numpy()
            np.save(path, array, allow_pickle=False)
            entry = {
                "name": name,
                "file": path.name,
                "dtype": str(array.dtype),
                "shape": list(array.shape),
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            record[role].append(entry)
    (folder / "golden.json").write_text(strict_json.dumps(record, indent=1) + "\n")


def has_graphs(folder: Path) -> bool:
    """Whether the files in a folder are graphs with a key-value cache."""
    return (folder / GRAPHS).is_file()


def most_tokens(folder: Path) -> int:
    """Tokens of a sequence that its graphs run without dropping any from the cache."""
    graphs = read_graphs(folder)["graphs"].values()
    context, tokens = (tuple(int(graph[key]) for graph in graphs) for key in ("context", "tokens"))
    # The last call, of the smallest graph, needs room for its padding, too.
    return min(max(context) - max(context) % max(tokens), max(context) + 1 - min(tokens))


def read_graphs(folder: Path) -> dict[str, Any]:
    """What `graphs.json` holds: sizes, files and grids of the graphs."""
    with reading(folder / GRAPHS):
        return json.loads((folder / GRAPHS).read_text())


class CachedGraphs(Runtime):
    """The graphs in a folder.

    Attributes:
        names: of the graphs, most tokens first, then the smallest context.
        tokens: new tokens of one call, by graph; 0 without a cache.
        contexts: new and past tokens together, by graph; 0 without a cache.
        fixed: inputs that are the same in every call; the strength of an adapter is 1.
    """

    def __init__(self, folder: Path, models: Mapping[str, OnnxModel]):
        record = read_graphs(folder)
        self.folder, self.models = folder, models
        self.graphs: dict[str, Any] = record["graphs"]
        self.has_genie_layout = record.get("layout") == GENIE
        self.adapter_inputs: dict[str, Any] = record.get("adapter_inputs", {})
        self.tokens: dict[str, int] = {n: g.get("tokens", 0) for n, g in self.graphs.items()}
        self.contexts: dict[str, int] = {n: g.get("context", 0) for n, g in self.graphs.items()}
        self.context = max(self.contexts.values())
        self.names = sorted(self.graphs, key=lambda n: (-self.tokens[n], self.contexts[n]))
        hosts = {name: graph["host"] for name, graph in self.graphs.items() if graph["host"]}
        self._hosts = {name: open_session(folder / file, {}) for name, file in hosts.items()}
        inputs = self.graphs[self.names[0]]["inputs"]
        self.fixed = {name: torch.ones(inputs[name]) for name in inputs if name == ALPHA}

    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        """See `Runtime`."""
        cache, parts, runs = self.empty_cache(), list[Tensor](), Counter[str]()
        tokens, first = ids.shape[1], 0
        while first < tokens:
            # A graph without room for all the tokens that it takes would drop the first ones of the
            # cache, also if the new ones are padding.
            fitting = [n for n in self.names if first + self.tokens[n] <= self.contexts[n]]
            if not fitting:
                raise ExportError(
                    f"{tokens} tokens do not fit into the context of {self.context}; give at most "
                    f"{first}, or export with a larger context"
                )
            left = tokens - steps - first
            name, share = self._next(fitting, left, runs if steps else None)
            count = min(self.tokens[name], share if left > 0 else tokens - first)
            runs[name] += 1
            _, outputs = self.call(name, ids[:, first : first + count], first, cache)
            parts.append(outputs["logits"][:, :count])
            first += count
        return torch.cat(parts, 1)

    def _next(self, fitting: list[str], left: int, runs: Counter[str] | None) -> tuple[str, int]:
        """The graph to call, and the tokens that it may take, of those that have room.

        Args:
            left: tokens before those that run one by one.
            runs: how often each graph ran; they take turns, small contexts first. None: the
                smallest graph that takes all that is left, else the largest; smallest context.
        """
        if runs is None:
            enough = min(left, self.tokens[fitting[0]])
            size = min(self.tokens[n] for n in fitting if self.tokens[n] >= enough)
            return next(n for n in fitting if self.tokens[n] == size), left
        fewest = self.tokens[self.names[-1]]
        larger = [n for n in fitting if self.tokens[n] > fewest]
        smallest = [n for n in fitting if self.tokens[n] == fewest]
        # Run these now: once tokens run one by one, the text may have outgrown their context.
        early = [n for n in smallest if self.contexts[n] < self.context]
        waiting = [n for n in (*larger, *early) if n not in runs] if left > 0 else []
        graphs = waiting or (larger if left > 0 else smallest) or smallest
        name = min(graphs, key=lambda n: (runs[n], self.contexts[n]))
        return name, math.ceil(left / max(1, len(waiting)))

    def empty_cache(self) -> dict[str, Tensor]:
        """Keys and values of no token, by input name, as `call` takes them."""
        cache = {}
        for name, shape in self.graphs[self.names[-1]]["inputs"].items():
            if name.startswith("past_"):
                axis = self._axis(name)
                cache[name] = torch.zeros(*shape[:axis], self.context, *shape[axis + 1 :])
        return cache

    def _axis(self, name: str) -> int:
        return 3 if self.has_genie_layout and "_key_" in name else 2

    def call(
        self,
        name: str,
        ids: Tensor,
        past: int,
        cache: dict[str, Tensor],
        positions: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One call of a graph: its inputs and its outputs, by name.

        Args:
            ids: as many as the graph takes, or fewer; the rest is padded on the right. A graph of
                embeddings takes these too, [1, tokens, width].
            past: tokens before.
            cache: keys and values, valid ones on the right, at least as many as the graph takes.
                Those of the new tokens are put into it.
            positions: of the new tokens, [1, tokens], or [3, 1, tokens] where an image is among
                them. Default: counted.
        """
        sizes, count = CacheSizes(self.tokens[name], self.contexts[name]), ids.shape[1]
        mask, counted = host_arguments(sizes, past, count)
        missing, host = sizes.tokens - count, self._hosts[name]
        counted = counted if positions is None else pad(positions, (0, missing))
        shapes = {value.name: value.shape for value in host.get_inputs()}
        of_host = HOST_INPUTS[POSITIONS]
        arguments = {HOST_INPUTS[MASK]: mask, of_host: counted.expand(shapes.get(of_host, (1, -1)))}
        new = {EMBEDS: ids} if ids.is_floating_point() else embedded({IDS: ids}, self.folder)
        new = {key: value if key == EMBEDS else value.int() for key, value in new.items()}
        padded = {k: pad(v, (0,) * 2 * (v.ndim - 2) + (0, missing)) for k, v in new.items()}
        inputs = {
            **run_session(host, arguments),
            **padded,
            **{k: v.narrow(self._axis(k), -sizes.past, sizes.past) for k, v in cache.items()},
            **self.fixed,
        }
        session = self.models[name].session
        # Golden files hold what the graph takes, which may be less than its host has.
        inputs = {taken.name: inputs[taken.name] for taken in session.get_inputs()}
        grids = self.graphs[name]["encodings"] if self.has_genie_layout else {}
        for wave in (COS, SIN) if self.has_genie_layout else ():
            shape = self.graphs[name]["inputs"][wave]
            inputs[wave] = inputs[wave][..., : shape[-1]].reshape(shape)
        codes = {n: to_codes(v, grids[n]) if n in grids else v for n, v in inputs.items()}
        outputs = run_session(session, codes)
        outputs = {n: to_values(v, grids[n]) if n in grids else v for n, v in outputs.items()}
        for key, value in cache.items():
            computed = outputs.get(key.replace("_in", "_out"))
            if computed is not None:
                axis = self._axis(key)
                longer = torch.cat([value, computed.narrow(axis, 0, count)], axis)
                cache[key] = longer.narrow(axis, -self.context, self.context)
        return codes, outputs

    def forward(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One call of a graph without a cache: its inputs and its outputs, by name."""
        (name,) = self.names
        host = self._hosts.get(name)
        arguments = {host_input(key): tensor for key, tensor in tensors.items()}
        lifted = run_session(host, arguments) if host else {}
        inputs, session = {**tensors, **lifted, **self.fixed}, self.models[name].session
        outputs = run_session(session, inputs)
        return {taken.name: inputs[taken.name] for taken in session.get_inputs()}, outputs

    def run(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self.forward(tensors)[1]

    def write_golden(self, sample: Mapping[str, Tensor], case: str = "") -> None:
        """Write one call of each graph, on the tokens after those of the one before; on the first
        tokens if no others are left, or its context has no room for them. `sample` has `input_ids`
        [1, tokens], best with a token for each graph; or the inputs of a model without a cache."""
        if not self.context:
            write_golden(self.folder / GOLDEN / case / FORWARD, *self.forward(sample))
            return
        ids, cache, past = sample[IDS], self.empty_cache(), 0
        for following, name in zip(reversed(range(len(self.names))), self.names, strict=True):
            if past == ids.shape[1] or past + self.tokens[name] > self.contexts[name]:
                cache, past = self.empty_cache(), 0
            count = min(self.tokens[name], max(1, ids.shape[1] - past - following))
            call = self.call(name, ids[:, past : past + count], past, cache)
            write_golden(self.folder / GOLDEN / case / name, *call)
            past += count
