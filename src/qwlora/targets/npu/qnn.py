"""The `qnn` target: compiled graphs with a key-value cache for Qualcomm's HTP, and adapters as
files of codes, which are inputs of the graphs.

    base/
      GRAPH.onnx, weights.data      QDQ graphs that share one weight file
      GRAPH_host.onnx               positions and mask -> cos, sin, float mask
      device/                       compiled for the HTP, weights once; for a device
        GRAPH_ctx.onnx, *.bin
      graphs.json                   sizes, files, grids of inputs and outputs
    first/, second/, zero/
      adapter.safetensors           codes of lora_A and lora_B, lora_alpha

GRAPH is `prompt_ar128_cl1024` (128 new tokens in a context of 1024), `token_ar1_cl1024`, and so on.

An adapter's tensors are inputs of every graph, under these names, so a runtime switches adapters by
feeding others; `zero` computes the base alone. All adapters share one grid, and have one shape:
zeros fill lower ranks, and layers that only others change (`adapter/padded_adapters.py`).

A model that is not a causal language model has one graph, `forward`, without a cache. Convolutions
need 8-bit weights (a rule for `quantize_`): the CPU dequantizes those of 16 bits.

Without onnxruntime-qnn nothing is compiled; the QDQ graphs can be compiled where it is installed.
onnxruntime-qnn holds the HTP compiler and an emulator of the HTP for x86-64 Linux. It computes what
the NPU computes, slowly, so it proves a bundle and measures no speed.

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
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from qwlora.errors import ExportError, MissingExtraError, listed
from qwlora.graph.nodes import calls, operation
from qwlora.graph.quantized_graph import GraphValue, Kind, QuantizedGraph
from qwlora.simulation.simulation import Simulation
from qwlora.system.atomic import read_tensors, write_tensors
from qwlora.system.optional_packages import require
from qwlora.system.parameter_names import BASE
from qwlora.targets.npu import genie
from qwlora.targets.npu.device_graph import ALPHA, scaling_of
from qwlora.targets.npu.htp_limits import CHIP, NORM_REMEDY, SMALLEST_RESCALE
from qwlora.targets.npu.htp_rewrites import CODES, npu_onnx
from qwlora.targets.npu.kv_cache_graphs import (
    GRAPHS,
    CachedGraphs,
    graph_sizes,
    read_graphs,
    share_weights,
    write_graphs,
)
from qwlora.targets.npu.npu_graph import NpuGraph, npu_graph
from qwlora.targets.onnx.onnx_model import save_graph
from qwlora.targets.onnx.onnx_runtime import (
    EMBEDDINGS_FILE,
    OnnxModel,
    open_session,
    write_embeddings,
)
from qwlora.targets.proof.checks import Limits, Parity, at_most
from qwlora.targets.proof.contents import TOKENIZER, Contents
from qwlora.targets.refusals import Subject, Weight, refusals
from qwlora.targets.registry import TARGETS
from qwlora.targets.target import NONE, Backend, ExportedGraph, LayerKind

WEIGHTS, ADAPTER, DEVICE, ZERO = "weights.data", "adapter.safetensors", "device", "zero"
PROVIDER = "QNNExecutionProvider"
# dB: the HTP rounds inside operators, where the simulation does not. Measured: 41 to 70.
HTP_SQNR = 35.0
_README = """\
Compiled with onnxruntime-qnn {version} for a device with this chip (soc_model {soc_model}, \
htp_arch {htp_arch}). Load them there,
with ONNX Runtime and its QNN provider. They were not run. Do not load them on x86-64: the emulator
cannot read a binary that graphs share, and may crash (exit 139). There, load ../*.onnx instead.
"""


class Qnn(Backend):
    """QDQ graphs; the HTP's emulator runs them, and ONNX Runtime on the CPU."""

    contents = Contents(
        adapter=(
            *(f"{BASE}/{name}" for name in ("*.onnx", WEIGHTS, GRAPHS, EMBEDDINGS_FILE)),
            f"{BASE}/{DEVICE}/*",
            f"*/{ADAPTER}",
            "*/*.raw",  # layout genie
            *genie.FORMS,
            *TOKENIZER,
        ),
        compiled=(f"{BASE}/{DEVICE}/",),
    )

    def write_cases(
        self, base: ExportedGraph, cases: Mapping[str, ExportedGraph], folder: Path
    ) -> None:
        """Write a bundle.

        Raises:
            ExportError: the HTP refuses the graphs or computes them wrongly, or adapters have
                different encodings (`base_activations="none"` gives them the same).
            FileExistsError: `folder` holds a bundle already.
            CaptureError, CalibrationError: see `npu_graph`.
        """
        simulations = {n: graph.simulation for n, graph in cases.items() if n != NONE}
        _refuse_different_encodings(simulations)
        first = next(iter(simulations.values()))
        scalings = {n: scaling_of(s.program) or 0.0 for n, s in simulations.items()}
        # the range of input lora_alpha, which has one grid for all adapters
        highest = max(scalings.values())
        if for_genie := base.layout == genie.GENIE:
            common = genie.common_scaling(scalings)
        npus = {name: npu_graph(first, sizes, highest) for name, sizes in graph_sizes(base).items()}
        for graph in npus.values():
            refuse_graph(graph.device)
        if for_genie:
            npus = {name: genie.genie_layout(npu, common) for name, npu in npus.items()}
            largest = next(iter(npus.values()))
            genie.refuse_other_positions(largest, base)
        graphs = folder / BASE
        graphs.mkdir(parents=True)
        codes, fields = _write_graphs(npus, graphs, base.metadata, for_genie)
        try:
            compiler = compile_graphs(graphs, list(npus))
        except MissingExtraError:
            compiler = None
        files: dict[str, dict[str, Any]] = {}
        for name in npus:
            compiled = compiled_file(name) if compiler else None
            files[name] = {"qdq": f"{name}.onnx", "compiled": compiled, **fields[name]}
        shapes = {name: list(array.shape) for name, array in codes.items()}
        more = {"adapter_inputs": shapes, "compiler": compiler, "layout": base.layout}
        write_graphs(graphs, npus, files, more)
        write_embeddings(base.simulation, graphs)
        for adapter in (*simulations, ZERO):
            tensors = {}
            for name, array in codes.items():
                stored = np.zeros_like(array)
                if adapter != ZERO:
                    weight = name.removesuffix(CODES)
                    encoding = simulations[adapter].encodings[weight]
                    quantized = encoding.quantize(simulations[adapter].adapter_weights[weight])
                    signed = quantized.int() + encoding.scheme.symmetric_offset
                    signed = signed.T if signed.ndim == 2 else signed  # not of a convolution
                    stored = np.ascontiguousarray(signed.numpy(), array.dtype)
                tensors[name] = torch.from_numpy(stored)
            (folder / adapter).mkdir()
            if for_genie:
                *_, of_graph = fields.values()
                genie.write_weights(folder / adapter, tensors, of_graph["encodings"])
            else:
                alpha = {ALPHA: torch.tensor([scalings.get(adapter, 0.0)])}
                write_tensors(folder / adapter / ADAPTER, alpha | tensors)
        if for_genie:
            genie.write_bundle(folder, largest, base, [*simulations, ZERO])

    def own_files(self, folder: Path, case: str) -> list[Path]:
        return list((folder / (ZERO if case == NONE else case)).iterdir())

    def open(self, folder: Path, case: str) -> QnnModel:
        return QnnModel(folder / BASE, folder / (ZERO if case == NONE else case), htp=True)


def refuse_graph(graph: QuantizedGraph) -> None:
    """Refuse what the HTP does not take or computes wrongly; see `htp_limits.py`."""
    nodes = {node.name: node for node in graph.program.graph.nodes}
    problems, checked = dict[str, list[str]](), dict[int, dict[str, Weight]]()
    widths = {
        mark.node: graph.encodings[mark.name].scheme.bitwidth
        for mark in graph.marks
        if mark.kind is Kind.ACTIVATION
    }

    def width(mark: GraphValue) -> int:
        # of what operators read next to a weight; inside a norm that has no grid, so of its result
        users = list(nodes[mark.node].users)
        inputs = [widths[n.name] for u in users for n in u.all_input_nodes if n.name in widths]
        return min(inputs or [widths[u.name] for u in users if u.name in widths], default=16)

    def readers(mark: GraphValue, *operators: str) -> list[Node]:
        return [user for user in nodes[mark.node].users if operation(user) in operators]

    for mark in graph.marks:
        scheme = graph.encodings[mark.name].scheme
        if mark.kind is Kind.ACTIVATION:
            continue
        if mark.kind is Kind.PARAMETER and readers(mark, "rms_norm", "layer_norm", "mul"):
            if width(mark) == 8 and (scheme.bitwidth != 8 or scheme.symmetric):
                needed = "the HTP multiplies activations of 8 bits with 8 bits and an offset"
                problem = f"{scheme}: {needed}; {NORM_REMEDY}"
                problems.setdefault(problem, []).append(mark.name)
            continue
        is_table = mark.kind is Kind.ADAPTER or readers(mark, "embedding")
        products = readers(mark, "linear", "matmul")
        if mark.kind is not Kind.PARAMETER or any(u.args[1] is nodes[mark.node] for u in products):
            kind = LayerKind.EMBEDDING if is_table else LayerKind.LINEAR
            checked.setdefault(width(mark), {})[mark.name] = Weight(scheme, kind=kind)
    problems |= _rescale_problems(graph)
    lines = [f"{listed(names, 3)}: {problem}" for problem, names in problems.items()]
    for bits, weights in checked.items():
        lines += refusals(TARGETS["qnn"], Subject(weights=weights, input_bits=bits))
    if lines:
        raise ExportError("Qualcomm's HTP does not take this base:\n  " + "\n  ".join(lines))


def _rescale_problems(graph: QuantizedGraph) -> dict[str, list[str]]:
    """Products whose result cannot be rescaled to its grid."""
    marks = {mark.node: mark for mark in graph.marks}
    problems: dict[str, list[str]] = {}
    for node in calls(graph.program):
        if operation(node) not in ("linear", "matmul"):
            continue
        names = [marks[n.name].name for n in (*node.all_input_nodes[:2], node) if n.name in marks]
        if len(names) == 3:
            x, w, y = (graph.encodings[name].scale for name in names)
            rescale = float(x) * float(w.min()) / float(y)
            if rescale <= SMALLEST_RESCALE:
                why = (
                    f"scale(x) scale(w) / scale(y) is {rescale:.3g}, and the HTP needs more than "
                    "2^-24. Give the layer's weight a coarser grid"
                )
                problems.setdefault(why, []).append(names[2])
    return problems


def _refuse_different_encodings(simulations: Mapping[str, Simulation]) -> None:
    (first, reference), *others = ((name, s.encodings) for name, s in simulations.items())
    for name, encodings in others:
        pairs = {n: (reference.get(n), encodings.get(n)) for n in {**reference, **encodings}}
        differing = [n for n, (a, b) in pairs.items() if a is None or not a.equals(b)]
        if differing:
            raise ExportError(
                f"adapters {first} and {name} have {len(differing)} different encodings, "
                f"{differing[0]} first, but all adapters share one graph. Simulate them together "
                "with base_activations: none"
            )


def _write_graphs(
    graphs: Mapping[str, NpuGraph], base: Path, metadata: Mapping[str, str], for_genie: bool
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Write the QDQ graphs, which share a weight file; returns the adapter's codes by input name,
    and fields of each graph in graphs.json."""
    codes, fields, first = dict[str, Any](), dict[str, dict[str, Any]](), next(iter(graphs))
    for name, graph in graphs.items():
        model, codes = npu_onnx(graph.device, {**metadata, "qwlora.graph": name})
        fields[name] = {"encodings": genie.quantize_edges_(model)} if for_genie else {}
        model.graph.name = name
        if name != first:
            share_weights(model, base / f"{first}.onnx")
        save_graph(model, base / f"{name}.onnx", WEIGHTS if name == first else None)
    return codes, fields


def compile_graphs(base: Path, names: list[str]) -> dict[str, str]:
    """Compile the QDQ graphs in `base` for the HTP, into folder `device`; they share their weights.
    Returns name and version of the compiler, and the chip."""
    _devices()
    (base / DEVICE).mkdir()
    sessions = []  # kept, since they share weights
    for name in names:
        entries = {
            "ep.context_enable": "1",
            "ep.context_embed_mode": "0",
            "ep.context_file_path": str(base / compiled_file(name)),
            "ep.share_ep_contexts": "1",
            "ep.stop_share_ep_contexts": "1" if name == names[-1] else "0",
        }
        provider = {"enable_htp_weight_sharing": "1"}
        sessions.append(open_graph(base / f"{name}.onnx", True, None, entries, provider))
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


class QnnGraph(OnnxModel):
    """A QDQ graph on the HTP emulator, or on the CPU without optimizations."""

    def __init__(self, file: Path, htp: bool, profile: Path | None):
        super().__init__(file.parent)
        self.file, self.htp, self.profile = file, htp, profile

    @cached_property
    def session(self) -> Any:
        return open_graph(self.file, self.htp, self.profile)


class QnnModel(CachedGraphs):
    """The graphs of a bundle with one adapter at a time.

    Args:
        htp: on the HTP emulator; else on the CPU, without optimizations.
        profiles: a folder for `placement` to record in what each provider runs.
    """

    def __init__(self, base: Path, adapter: Path, htp: bool, profiles: Path | None = None):
        # The emulator compiles the QDQ graphs again. It cannot load a context binary that several
        # graphs share: onnxruntime-qnn 2.7 reports QNN_COMMON_ERROR_NOT_SUPPORTED, or crashes. So
        # this proves what the compiler makes of these graphs, not the binary's bytes.
        models = {}
        for name, graph in read_graphs(base)["graphs"].items():
            profile = profiles / name if profiles else None
            models[name] = QnnGraph(base / str(graph["qdq"]), htp, profile)
        super().__init__(base, models)
        self.switch_to(adapter)

    def switch_to(self, adapter: Path | None) -> None:
        self.adapter = adapter or self.folder.parent / ZERO
        if self.has_genie_layout:
            weights = genie.read_weights(self.adapter, self.adapter_inputs)
            self.fixed = {**weights, ALPHA: torch.ones(1)}
        else:
            self.fixed, _ = read_tensors(self.adapter / ADAPTER)

    def parity(self, compare: Callable[[QnnModel, Limits, str], Parity], limits: Limits) -> Parity:
        """On the CPU and, if the emulator is installed, on the HTP. `exact` has figures of the
        last; `not_run` says how to install it."""
        run = compare(QnnModel(self.folder, self.adapter, htp=False), limits, " on the CPU")
        parity = Parity({"cpu": run.figures, "exact": {"adapter": run.figures}}, run.checks)
        try:
            _devices()
        except MissingExtraError as error:
            return parity.extended({"not_run": str(error)})
        with tempfile.TemporaryDirectory() as profiles:
            model = QnnModel(self.folder, self.adapter, htp=True, profiles=Path(profiles))
            on_htp = replace(limits, sqnr=min(limits.sqnr, HTP_SQNR))
            run = compare(model, on_htp, " on the HTP")
            placement = model.placement()
        figures: dict[str, Any] = {"htp": run.figures, "exact": {"adapter": run.figures}}
        rows = list(run.checks)
        for name, ran in placement.items():
            nodes = f" (of {listed(ran['cpu_names'], 4)})" if ran["cpu_nodes"] else ""
            rows += [
                at_most(f"partitions of graph {name} on the HTP", ran["partitions"], 1),
                at_most(f"nodes of graph {name} on the CPU{nodes}", ran["cpu_nodes"], 0),
            ]
        return parity.extended({**figures, "placement": placement}, *rows)

    def placement(self) -> dict[str, dict[str, Any]]:
        """`placement` of each graph that ran, which needs `profiles`."""
        edges = {n: len(g["inputs"]) + len(g["outputs"]) for n, g in self.graphs.items()}
        ran = {n: model.session for n, model in self.models.items() if "session" in vars(model)}
        return {name: placement(session, edges[name]) for name, session in ran.items()}


def open_graph(
    path: Path,
    htp: bool,
    profile: Path | None = None,
    entries: Mapping[str, str] | None = None,
    provider: Mapping[str, str] | None = None,
) -> Any:
    """A session of a QDQ graph: compiled for the HTP's emulator, or on the CPU.

    Args:
        profile: prefix of a file for `placement`.
        entries, provider: further options of the session, and of the HTP.
    """
    # Optimizations would replace Q/DQ pairs by integer kernels, which round elsewhere.
    if not htp:
        return open_session(path, entries or {}, is_optimized=False, profile=profile)
    library = require("onnxruntime_qnn", "qnn").get_qnn_htp_path()
    device = _devices(), {"backend_path": library, **CHIP, **(provider or {})}
    return open_session(path, entries or {}, profile=profile, device=device)


def placement(session: Any, edges: int) -> dict[str, Any]:
    """Partitions on the HTP, and what ran on the CPU besides the graph's edges. Ends profiling.

    Args:
        edges: how many inputs may be quantized and outputs dequantized on the CPU.
    """
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = {
        event["name"]: event["args"]
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("kernel_time")
    }
    on_cpu = {n: str(k.get("op_name")) for n, k in kernels.items() if k.get("provider") != PROVIDER}
    at_edges = [n for n, op in on_cpu.items() if op in ("QuantizeLinear", "DequantizeLinear")]
    inside = [name for name in on_cpu if name not in at_edges]
    return {
        "partitions": len(kernels) - len(on_cpu),
        "cpu_nodes": len(inside) + max(0, len(at_edges) - edges),
        "edge_nodes": len(at_edges),
        # those inside first: a message names the first few
        "cpu_names": [name.removesuffix("_kernel_time") for name in (*inside, *at_edges)],
    }


@cache
def _devices() -> list[Any]:
    """The HTP as a device of ONNX Runtime; raises MissingExtraError without onnxruntime-qnn."""
    # cached, since a process registers a provider once
    provider, runtime = require("onnxruntime_qnn", "qnn"), require("onnxruntime", "qnn")
    _keep_libffi()
    runtime.register_execution_provider_library(PROVIDER, provider.get_library_path())
    return [device for device in runtime.get_ep_devices() if device.ep_name == PROVIDER][:1]


def _keep_libffi() -> None:
    """Let cffi, with which llama.cpp is called, keep its libffi."""
    # libQnnHtp.so has a libffi of its own, of another version, and ONNX Runtime loads it for the
    # whole process: calls through cffi would then crash. Names are looked up in the order in which
    # libraries were made visible to all, so the one that is already in memory is made so first.
    maps = Path("/proc/self/maps")  # of Linux; elsewhere, libraries have names of their own
    if importlib.util.find_spec("_cffi_backend") is None or not maps.exists():
        return
    importlib.import_module("_cffi_backend")
    files = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()}
    for file in sorted(file for file in files if "/libffi" in file):
        ctypes.CDLL(file, mode=ctypes.RTLD_GLOBAL)
