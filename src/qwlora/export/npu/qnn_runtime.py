"""Run the graphs of a `qnn` bundle: on Qualcomm's HTP emulator, or in ONNX Runtime on the CPU.

onnxruntime-qnn holds the HTP compiler and an emulator of the HTP for x86-64 Linux. It computes what
the NPU computes, slowly, so it proves a bundle and measures no speed. It cannot load a context
binary that several graphs share: version 2.7 reports QNN_COMMON_ERROR_NOT_SUPPORTED or crashes
(exit 139). So the compiled graphs are in a folder for devices, and the emulator compiles the QDQ
graphs again: what is proven is what the compiler makes of these graphs, not the binary's bytes.

    run = QnnModel(folder / "base", folder / "first", htp=True)
    run.logits(ids)               prefill in pieces, then token by token; the cache is on the host
    run.use(folder / "zero")      another adapter in the same loaded graphs
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import json
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qwlora.errors import ExportError, foreign_as
from qwlora.export.npu.kv_cache_graphs import CachedGraphs
from qwlora.export.onnx.onnx_runtime import expose_activations
from qwlora.system.atomic import read_tensors
from qwlora.system.optional_packages import require

# Snapdragon 8 Gen 3. The provider's default is an old chip without 4-bit blocks and 16-bit weights.
CHIP = {"soc_model": "57", "htp_arch": "75"}
PROVIDER = "QNNExecutionProvider"
ZERO = "zero"
ADAPTER = "adapter.safetensors"
DEVICE = "device"
_README = """\
Compiled with onnxruntime-qnn {version} for a device with this chip (soc_model {soc_model}, \
htp_arch {htp_arch}). Load them there,
with ONNX Runtime and its QNN provider. They were not run. Do not load them on x86-64: the emulator
cannot read a binary that two graphs share, and may crash (exit 139). There, load ../*.onnx instead.
"""


def compile_graphs(base: Path, names: list[str]) -> dict[str, str]:
    """Compile the QDQ graphs in `base` for the HTP, into folder `device`; they share their weights.

    Returns:
        name and version of the compiler, and the chip.

    Raises:
        MissingExtraError: onnxruntime-qnn is not installed.
        ExportError: the compiler refuses a graph, or writes nothing.
    """
    devices = _devices()
    (base / DEVICE).mkdir()
    sessions = []
    for name in names:
        options = _options()
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(base / compiled_file(name)),
            "ep.share_ep_contexts": "1",
            "ep.stop_share_ep_contexts": "1" if name == names[-1] else "0",
        }
        for key, value in entries.items():
            options.add_session_config_entry(key, value)
        provider = {**_provider(), "enable_htp_weight_sharing": "1"}
        options.add_provider_for_devices(devices, provider)
        sessions.append(_session(base / f"{name}.onnx", options))
    for name in names:
        if not (base / compiled_file(name)).is_file():
            raise ExportError(
                f"onnxruntime-qnn read {str(base / f'{name}.onnx')!r} without an error, but wrote "
                f"no {compiled_file(name)}. Install another version of onnxruntime-qnn, "
                "or remove it to export without compiling"
            )
    version = str(require("onnxruntime_qnn", "qnn").__version__)
    (base / DEVICE / "README.md").write_text(_README.format(version=version, **CHIP))
    return {"onnxruntime-qnn": version, **CHIP}


def compiled_file(name: str) -> str:
    """The file in `base` of a compiled graph."""
    return f"{DEVICE}/{name}_ctx.onnx"


class QnnModel(CachedGraphs):
    """The graphs of a bundle with one adapter at a time.

    Args:
        base: folder of the graphs.
        adapter: folder of an adapter.
        htp: on the HTP emulator; else on the CPU, without optimizations.
        profiles: a folder for `placement` to record in what each provider runs.
    """

    def __init__(self, base: Path, adapter: Path, htp: bool, profiles: Path | None = None):
        super().__init__(base)
        self.htp = htp
        self._sessions: dict[str, Any] = {}
        self._profiles = profiles
        self.use(adapter)

    def use(self, adapter: Path | None) -> None:
        tensors, _ = read_tensors((adapter or self.folder.parent / ZERO) / ADAPTER)
        self.fixed = {name: tensor.numpy() for name, tensor in tensors.items()}

    def _file(self, name: str) -> Path:
        return self.folder / str(self.graphs[name]["qdq"])

    def open(self, name: str) -> Any:
        if name not in self._sessions:
            profile = self._profiles / name if self._profiles is not None else None
            self._sessions[name] = open_graph(self._file(name), self.htp, profile)
        return self._sessions[name]

    def open_layers(self, name: str) -> tuple[Any, list[str]]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / f"{name}.onnx"
            names = expose_activations(self._file(name), path)
            return open_graph(path, htp=False), names

    def placement(self) -> dict[str, dict[str, Any]]:
        """By graph: partitions on the HTP, and what ran on the CPU besides the graph's edges.

        The edges are the quantization of inputs and the dequantization of outputs. Ends profiling,
        which needs `profiles`.
        """
        return {
            name: placement(session, sum(len(self.graphs[name][k]) for k in ("inputs", "outputs")))
            for name, session in self._sessions.items()
        }


def open_graph(path: Path, htp: bool, profile: Path | None = None) -> Any:
    """A session of a QDQ graph.

    Args:
        htp: compile it for the HTP, for its emulator; else the CPU, without optimizations.
        profile: prefix of a file for `placement`.
    """
    options = _options()
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    if htp:
        options.add_provider_for_devices(_devices(), _provider())
    else:
        levels = require("onnxruntime", "onnx").GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    return _session(path, options)


def placement(session: Any, edges: int) -> dict[str, int]:
    """Partitions on the HTP, and what ran on the CPU besides the graph's edges. Ends profiling.

    Args:
        session: opened with a profile, and run.
        edges: how many inputs may be quantized and outputs dequantized on the CPU.
    """
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time")
    }
    ran = Counter((kernel.get("provider"), kernel.get("op_name")) for kernel in kernels.values())
    on_cpu = {op: n for (provider, op), n in ran.items() if provider != PROVIDER}
    at_edges = sum(n for op, n in on_cpu.items() if op in ("QuantizeLinear", "DequantizeLinear"))
    return {
        "partitions": sum(n for (provider, _), n in ran.items() if provider == PROVIDER),
        "cpu_nodes": sum(on_cpu.values()) - at_edges + max(0, at_edges - edges),
        "edge_nodes": at_edges,
    }


def require_emulator() -> None:
    """Import onnxruntime-qnn."""
    _devices()


@cache
def _devices() -> list[Any]:
    """The HTP as a device of ONNX Runtime."""
    provider, runtime = require("onnxruntime_qnn", "qnn"), require("onnxruntime", "qnn")
    _keep_libffi()
    runtime.register_execution_provider_library(PROVIDER, provider.get_library_path())
    return [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER][:1]


def _keep_libffi() -> None:
    """Let cffi, with which llama.cpp is called, keep its libffi.

    libQnnHtp.so has a libffi of its own, of another version, and ONNX Runtime loads it for the
    whole process: calls through cffi would then crash. Names are looked up in the order in which
    libraries were made visible to all, so the one that is already in memory is made so first.
    """
    maps = Path("/proc/self/maps")  # of Linux; elsewhere, libraries have names of their own
    if importlib.util.find_spec("_cffi_backend") is None or not maps.exists():
        return
    importlib.import_module("_cffi_backend")
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    for file in sorted(file for file in files if "/libffi" in file):
        ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)


def _provider() -> dict[str, str]:
    return {"backend_path": require("onnxruntime_qnn", "qnn").get_qnn_htp_path(), **CHIP}


def _options() -> Any:
    options = require("onnxruntime", "onnx").SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    return options


def _session(path: Path, options: Any) -> Any:
    with foreign_as(ExportError, f"ONNX Runtime cannot load {str(path)!r}"):
        return require("onnxruntime", "onnx").InferenceSession(str(path), options)
