"""Run the graphs of a `qnn` bundle: on Qualcomm's HTP emulator, or in ONNX Runtime on the CPU.

onnxruntime-qnn holds the HTP compiler and an emulator of the HTP for x86-64 Linux. It computes what
the NPU computes, slowly, so it proves a bundle and measures no speed. It cannot load a context
binary that several graphs share (QNN_COMMON_ERROR_NOT_SUPPORTED), so it compiles the QDQ graphs
again: what is proven is what the compiler makes of these graphs, not the bytes of the binary.

    run = QnnModel(folder / "base", folder / "first", htp=True)
    run.logits(ids)               prefill in pieces, then token by token; the cache is on the host
    run.use(folder / "zero")      another adapter in the same loaded graphs
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora.atomic import read_tensors
from qwlora.errors import ExportError, reading
from qwlora.export.onnx_runtime import expose_activations
from qwlora.graph.cached_capture import MASK, POSITIONS
from qwlora.graph.host_inputs import HOST_INPUTS
from qwlora.system.optional_packages import require

# Snapdragon 8 Gen 3. The provider's default is an old chip without 4-bit blocks and 16-bit weights.
CHIP = {"soc_model": "57", "htp_arch": "75"}
PROVIDER = "QNNExecutionProvider"
BASE, RECORD = "base", "qwlora.json"
GRAPHS, ADAPTER = "graphs.json", "adapter.safetensors"


def compile_graphs(base: Path, names: list[str]) -> dict[str, str]:
    """Compile the QDQ graphs in `base` for the HTP; the results share their weights.

    Returns:
        name and version of the compiler, and the chip.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        ExportError: the compiler refuses a graph.
    """
    devices = _devices()
    sessions = []
    for name in names:
        options = _options()
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(base / f"{name}_ctx.onnx"),
            "ep.share_ep_contexts": "1",
        }
        if name == names[-1]:
            entries["ep.stop_share_ep_contexts"] = "1"
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        provider = {**_provider(), "enable_htp_weight_sharing": "1"}
        options.add_provider_for_devices(devices, provider)
        sessions.append(_session(base / f"{name}.onnx", options))
    return {"onnxruntime-qnn": str(require("onnxruntime_qnn", "qnn").__version__), **CHIP}


def most_tokens(bundle: Path) -> int:
    """Tokens of a sequence that its graphs run without dropping any from the cache."""
    record = read_graphs(bundle / BASE)
    context: int = record["context"]
    return context - context % _largest_call(record)


def largest_call(bundle: Path) -> int:
    """New tokens of one call of the largest graph."""
    return _largest_call(read_graphs(bundle / BASE))


def read_graphs(base: Path) -> dict[str, Any]:
    """What `graphs.json` holds: sizes, files and grids of the graphs.

    Raises:
        SourceError: it cannot be read.
    """
    with reading(base / GRAPHS):
        record: dict[str, Any] = json.loads((base / GRAPHS).read_text())
    return record


def _largest_call(record: Mapping[str, Any]) -> int:
    return max(int(graph["tokens"]) for graph in record["graphs"].values())


class QnnModel:
    """The graphs of a bundle with one adapter at a time.

    Args:
        base: folder of the graphs.
        adapter: folder of an adapter.
        htp: on the HTP emulator; else on the CPU, without optimizations.
        profile: count what each provider runs; see `placement`.

    Raises:
        ExportError: the graphs cannot be read.
        MissingExtraError: a package is not installed.
    """

    def __init__(self, base: Path, adapter: Path, htp: bool, profile: bool = False):
        self.base, self.htp = base, htp
        self.record = read_graphs(base)
        graphs = self.record["graphs"]
        self.names = sorted(graphs, key=lambda name: -graphs[name]["tokens"])
        self._sessions: dict[str, Any] = {}
        self._hosts = {n: _session(base / graphs[n]["host"], _options()) for n in self.names}
        self._profiles = Path(tempfile.mkdtemp()) if profile else None
        self.use(adapter)

    def use(self, adapter: Path) -> None:
        """Feed another adapter from now on; loaded graphs stay."""
        tensors, _ = read_tensors(adapter / ADAPTER)
        self._adapter = {name: tensor.numpy() for name, tensor in tensors.items()}

    @torch.no_grad()
    def logits(self, ids: Tensor, steps: int = 0) -> Tensor:
        """Logits [1, tokens, vocabulary] of ids [1, tokens].

        Args:
            steps: the last tokens to run one by one, by the smallest graph.
        """
        tokens, graphs = ids.shape[1], self.record["graphs"]
        if tokens > self.record["context"]:
            raise ExportError(
                f"{tokens} tokens do not fit into the context of {self.record['context']}; give "
                "fewer, or export with a larger one"
            )
        smallest, cache = self.names[-1], self.empty_cache()
        found, first = [], 0
        while first < tokens:
            left = tokens - steps - first
            name = self.names[0] if left > 0 else smallest
            size = graphs[name]["tokens"]
            count = min(size, left) if left > 0 else min(size, tokens - first)
            found.append(self.extend(name, ids[:, first : first + count], first, cache))
            first += count
        return torch.from_numpy(np.concatenate(found, 1))

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
        count, room = ids.shape[1], self.record["context"]
        outputs = self.call(name, ids, past, cache)
        for each in cache:
            new = outputs[each.replace("_in", "_out")][:, :, :count]
            cache[each] = np.concatenate([cache[each], new], 2)[:, :, -room:]
        return outputs["logits"][:, :count]

    def call(self, name: str, ids: Tensor, past: int, cache: Mapping[str, Any]) -> dict[str, Any]:
        """One call of a graph: its outputs by name.

        Args:
            ids: as many as the graph takes, or fewer; the rest is padded on the right.
            past: tokens before.
            cache: keys and values, valid ones on the right, at least as many as the graph takes.
        """
        session = self._open(name)
        feed = self._feed(name, session, ids, past, cache)
        outputs = [output.name for output in session.get_outputs()]
        return dict(zip(outputs, self._run(name, session, outputs, feed), strict=True))

    def layers(self, ids: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """One call of the largest graph, with an empty cache, on the CPU.

        Args:
            ids: as many as the graph takes, or fewer; see `call`.

        Returns:
            its inputs by name, and every quantized activation by name of the tensor.
        """
        name = self.names[0]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{name}.onnx"
            names = expose_activations(self.base / self.record["graphs"][name]["qdq"], path)
            session = _session(path, _cpu_options())
        feed = self._feed(name, session, ids, 0, self.empty_cache())
        values = zip(names, self._run(name, session, names, feed), strict=True)
        given = {key: torch.from_numpy(np.ascontiguousarray(array)) for key, array in feed.items()}
        return given, {key: torch.from_numpy(array) for key, array in values}

    def _feed(
        self, name: str, session: Any, ids: Tensor, past: int, cache: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The inputs of a call, see `call`."""
        graph = self.record["graphs"][name]
        size, context = graph["tokens"], self.record["context"]
        room, count = context - size, ids.shape[1]
        mask = np.zeros((1, context), np.int64)
        mask[:, room - min(past, room) : room + count] = 1
        positions = np.arange(past, past + size)[None]
        given = {HOST_INPUTS[MASK]: mask, HOST_INPUTS[POSITIONS]: positions}
        host = self._hosts[name]
        wanted = [output.name for output in host.get_outputs()]
        taken = [each.name for each in host.get_inputs()]
        feed = dict(zip(wanted, host.run(wanted, {n: given[n] for n in taken}), strict=True))
        feed["input_ids"] = np.zeros((1, size), np.int32)
        feed["input_ids"][:, :count] = ids.numpy()
        feed |= {n: value[:, :, value.shape[2] - room :] for n, value in cache.items()}
        feed |= self._adapter
        inputs = [each.name for each in session.get_inputs()]
        if missing := [each for each in inputs if each not in feed]:
            raise ExportError(
                f"graph {name} in {str(self.base)!r} has an input {missing[0]} that neither its "
                "host graph nor the adapter gives; export the bundle again"
            )
        return {each: feed[each] for each in inputs}

    def _run(self, name: str, session: Any, outputs: list[str], feed: Mapping[str, Any]) -> Any:
        try:
            return session.run(outputs, dict(feed))
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise ExportError(f"graph {name} in {str(self.base)!r}: {error}") from error

    def placement(self) -> dict[str, dict[str, Any]]:
        """By graph: partitions on the HTP, and what ran on the CPU besides the graph's edges.

        The edges are the quantization of inputs and the dequantization of outputs. Ends profiling.
        """
        graphs, found = self.record["graphs"], {}
        for name, session in self._sessions.items():
            edges = len(graphs[name]["inputs"]) + len(graphs[name]["outputs"])
            found[name] = placement(session, edges)
        if self._profiles is not None:
            shutil.rmtree(self._profiles)
        return found

    def _open(self, name: str) -> Any:
        if name not in self._sessions:
            graph = self.record["graphs"][name]
            profile = self._profiles / name if self._profiles is not None else None
            self._sessions[name] = open_graph(self.base / graph["qdq"], self.htp, profile)
        return self._sessions[name]


def open_graph(path: Path, htp: bool, profile: Path | None = None) -> Any:
    """A session of a QDQ graph.

    Args:
        htp: compile it for the HTP, for its emulator; else the CPU, without optimizations.
        profile: prefix of a file for `placement`.

    Raises:
        ExportError: it cannot be read or compiled.
        MissingExtraError: a package is not installed.
    """
    options = _options() if htp else _cpu_options()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if htp:
        options.add_provider_for_devices(_devices(), _provider())
    return _session(path, options)


def placement(session: Any, edges: int) -> dict[str, int]:
    """Partitions on the HTP, and what ran on the CPU besides the graph's edges. Ends profiling.

    Args:
        session: opened with a profile, and run.
        edges: how many inputs may be quantized and outputs dequantized on the CPU.
    """
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = Counter(
        (event["args"].get("provider"), event["args"].get("op_name"))
        for event in {
            e["name"]: e
            for e in events
            if e.get("cat") == "Node" and e["name"].endswith("kernel_time")
        }.values()
    )
    on_cpu = {op: n for (provider, op), n in ran.items() if provider != PROVIDER}
    at_edges = sum(n for op, n in on_cpu.items() if op in ("QuantizeLinear", "DequantizeLinear"))
    return {
        "partitions": sum(n for (provider, _), n in ran.items() if provider == PROVIDER),
        "cpu_nodes": sum(on_cpu.values()) - at_edges + max(0, at_edges - edges),
        "edge_nodes": at_edges,
    }


def require_emulator() -> None:
    """Import onnxruntime-qnn.

    Raises:
        MissingExtraError: it is not installed.
    """
    _devices()


@cache
def _devices() -> list[Any]:
    """The HTP as a device of ONNX Runtime.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
    """
    provider, runtime = require("onnxruntime_qnn", "qnn"), require("onnxruntime", "qnn")
    runtime.register_execution_provider_library(PROVIDER, provider.get_library_path())
    return [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER][:1]


def _provider() -> dict[str, str]:
    return {"backend_path": require("onnxruntime_qnn", "qnn").get_qnn_htp_path(), **CHIP}


def _options() -> Any:
    options = require("onnxruntime", "onnx").SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _cpu_options() -> Any:
    """Options without optimizations: the graph as it is written."""
    runtime, options = require("onnxruntime", "onnx"), _options()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _session(path: Path, options: Any) -> Any:
    runtime = require("onnxruntime", "onnx")
    try:
        return runtime.InferenceSession(str(path), options)
    except Exception as error:  # onnxruntime's exceptions have no common base class
        raise ExportError(f"ONNX Runtime cannot load {str(path)!r}: {error}") from error
