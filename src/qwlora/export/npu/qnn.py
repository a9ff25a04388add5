"""The `qnn` target: compiled graphs with a key-value cache for Qualcomm's HTP, and adapters as
files of codes, which are inputs of the graphs.

    export_qnn({"first": a, "second": b}, {"prefill": 128, "decode": 1}, 1024, folder)

    base/
      prefill.onnx, decode.onnx, weights.data       QDQ graphs that share one weight file
      prefill_host.onnx, decode_host.onnx           positions and mask -> cos, sin, float mask
      device/                                       compiled for the HTP, weights once; for a device
        prefill_ctx.onnx, decode_ctx.onnx, *.bin
      graphs.json                                   sizes, files, grids of inputs and outputs
      qwlora.json                                   fingerprint, digests
    first/, second/, zero/
      adapter.safetensors                           codes of lora_A and lora_B, lora_alpha
      qwlora.json

An adapter's tensors are inputs of every graph, under these names, so a runtime switches adapters by
feeding others; `zero` computes the base alone. All adapters share one grid. An adapter of a lower
rank than the highest is padded with zeros.

Without onnxruntime-qnn nothing is compiled; the QDQ graphs can be compiled where it is installed.

It is proven by its graphs on the CPU and on Qualcomm's HTP emulator:

    files       every file has the digest that was recorded; adapters fit the graphs
    CPU         in ONNX Runtime without optimizations
    HTP         if onnxruntime-qnn is installed; also partitions, and nodes left to the CPU

The logits are compared as those of all targets, see `proof/compare.py`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwlora.errors import ExportError, FingerprintError, MissingExtraError, listed
from qwlora.export.npu.htp_limits import (
    SMALLEST_RESCALE,
    input_problem,
    table_problem,
    weight_problem,
)
from qwlora.export.npu.htp_rewrites import CODES, npu_onnx
from qwlora.export.npu.kv_cache_graphs import share_weights, write_graphs
from qwlora.export.npu.qnn_runtime import (
    ADAPTER,
    ZERO,
    QnnModel,
    compile_graphs,
    compiled_file,
    require_emulator,
)
from qwlora.export.proof.checks import Parity, at_most
from qwlora.export.proof.compare import compare_logits
from qwlora.export.proof.folder import RECORD, record_digest
from qwlora.export.proof.reference import first_sequences
from qwlora.export.target import BASE, NONE, Backend, ExportedUseCases
from qwlora.formats import manifest
from qwlora.graph.device_graph import ALPHA, scaling_of
from qwlora.graph.kv_cache_capture import CacheSizes
from qwlora.graph.nodes import calls, operation
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.simulation.npu_graph import NpuGraph, npu_graph
from qwlora.simulation.simulation import Simulation
from qwlora.system.atomic import files_in, write_tensors
from qwlora.system.optional_packages import require


class Qnn(Backend):
    """QDQ graphs; the HTP's emulator runs them, and ONNX Runtime on the CPU."""

    def write_cases(self, exported: ExportedUseCases, folder: Path) -> None:
        simulations = {}
        for case, graph in exported.cases.items():
            assert isinstance(graph.simulation, Simulation)
            if case != NONE:
                simulations[case] = graph.simulation
        base = exported.base
        export_qnn(simulations, base.graphs, base.context, folder, base.metadata)

    def own_files(self, folder: Path, case: str) -> list[Path]:
        return list((folder / _folder(case)).iterdir())

    def open(self, folder: Path, case: str) -> QnnRuntime:
        return QnnRuntime(folder, _folder(case))

    def usage(self, base: str, adapter: str | None, has_cache: bool = True) -> str:
        return (
            f"`{base}` holds graphs with a key-value cache for Qualcomm's HTP, and a folder for "
            "each adapter, whose tensors are inputs of the graphs."
        )


def _folder(case: str) -> str:
    """Of a use case; the one without an adapter has the zero adapter."""
    return ZERO if case == NONE else case


class QnnRuntime(QnnModel):
    """The graphs with one adapter, on the HTP's emulator."""

    def __init__(self, bundle: Path, adapter: str):
        check_bundle(bundle, adapter)
        super().__init__(bundle / BASE, bundle / adapter, htp=True)
        self.bundle, self.adapter = bundle, adapter

    def parity(self, reference: Mapping[str, Tensor]) -> Parity:
        return verify_qnn(self.bundle, self.adapter, reference)


DECODED = 4  # of the last tokens of a sequence: one by one, since the emulator takes seconds


def check_bundle(folder: Path, name: str) -> None:
    """Compare the files of the graphs and of adapter `name` with what was recorded.

    Raises:
        FingerprintError: a file was changed, added or removed, or the adapter is not one of these
            graphs.
    """
    for part in (folder / BASE, folder / name):
        what = f"{str(part)!r}"
        if not manifest.has_digests(part, RECORD):
            raise FingerprintError(f"{what} has no readable {RECORD}; copy it again")
        manifest.check(part, RECORD, what, "export it again")
        if added := sorted({*files_in(part)} - {*manifest.listed_files(part, RECORD)}):
            raise FingerprintError(
                f"{what} holds files that were not exported: {listed(added)}; remove them"
            )
    record = json.loads((folder / name / RECORD).read_text())
    of_these = record.get("base") == record_digest(folder / BASE)
    if record.get("adapter") != name or not of_these:
        raise FingerprintError(
            f"{str(folder / name)!r} holds adapter {record.get('adapter')} of "
            f"{'these' if of_these else 'other'} graphs; copy the whole bundle again"
        )


def verify_qnn(folder: Path, name: str, reference: Mapping[str, Tensor]) -> Parity:
    """Run the first sequence of a reference with one adapter.

    Args:
        name: of the adapter's folder.

    Returns:
        figures of the CPU and, if the emulator is installed, of the HTP; `exact` has those of the
        last. Otherwise `not_run` says how to install it.

    Raises:
        ExportError: a runtime refuses the files.
    """
    base, adapter = folder / BASE, folder / name
    one = first_sequences(reference, 1)
    steps = min(DECODED, one["ids"].shape[1] - 1)
    on_cpu = partial(QnnModel(base, adapter, htp=False).logits, steps=steps)
    run = compare_logits(on_cpu, one, where=" on the CPU")
    parity = Parity({"cpu": run.to_json(), "exact": {"adapter": run.to_json()}}, (run,))
    try:
        require_emulator()
    except MissingExtraError as error:
        return parity.extended({"not_run": str(error)})
    with tempfile.TemporaryDirectory() as profiles:
        model = QnnModel(base, adapter, htp=True, profiles=Path(profiles))
        run = compare_logits(partial(model.logits, steps=steps), one, where=" on the HTP")
        placement = model.placement()
    figures: dict[str, Any] = {"htp": run.to_json(), "exact": {"adapter": run.to_json()}}
    rows = [
        row
        for name, place in placement.items()
        for row in (
            at_most(f"partitions of graph {name} on the HTP", place["partitions"], 1),
            at_most(f"nodes of graph {name} on the CPU", place["cpu_nodes"], 0),
        )
    ]
    return parity.extended({**figures, "placement": placement}, run, *rows)


WEIGHTS = "weights.data"


def export_qnn(
    simulations: Mapping[str, Simulation],
    graphs: Mapping[str, int],
    context: int,
    folder: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a bundle into `folder`.

    Args:
        simulations: calibrated, by adapter, with one set of encodings for all
            (`base_activations="none"`).
        graphs: number of new tokens of each graph, by name.
        context: new and past tokens together, in every graph.
        metadata: added to the ONNX files.

    Raises:
        ExportError: `folder` holds a part of a bundle already, the HTP refuses the graphs or
            computes them wrongly, or adapters have different encodings.
        CaptureError, CalibrationError: see `npu_graph`.
        MissingExtraError: the `onnx` extra is not installed.
    """
    if ZERO in simulations or BASE in simulations:
        raise ExportError(f"an adapter is called {ZERO} or {BASE}; choose another name")
    if there := [name for name in (BASE, *simulations, ZERO) if (folder / name).exists()]:
        raise ExportError(
            f"{str(folder)!r} already holds {listed(there)}; remove it, or export into another "
            "folder"
        )
    _refuse_different_encodings(simulations)
    ranks = {
        name: max((min(t.shape) for t in simulation.adapter_weights.values()), default=0)
        for name, simulation in simulations.items()
    }
    largest = max(simulations, key=ranks.__getitem__)
    scaling = max(scaling_of(each.program) or 0.0 for each in simulations.values())
    made = {
        name: npu_graph(simulations[largest], CacheSizes(tokens, context), scaling)
        for name, tokens in graphs.items()
    }
    for graph in made.values():
        refuse_graph(graph.device)
    base = folder / BASE
    base.mkdir(parents=True)
    codes = _write_graphs(made, base, metadata or {})
    try:
        compiler = compile_graphs(base, list(made))
    except MissingExtraError:
        compiler = None
    shapes = {name: list(array.shape) for name, array in codes.items()}
    files = {
        name: {"qdq": f"{name}.onnx", "compiled": compiled_file(name) if compiler else None}
        for name in made
    }
    write_graphs(base, made, files, {"adapter_inputs": shapes, "compiler": compiler})
    manifest.write(base, RECORD, {}, files_in(base))
    for name, simulation in simulations.items():
        own = {n: _padded(_codes(simulation, n), array) for n, array in codes.items()}
        _write_adapter(folder, name, own, scaling_of(simulation.program) or 0.0)
    _write_adapter(folder, ZERO, {n: np.zeros_like(array) for n, array in codes.items()}, 0.0)


def refuse_graph(graph: QuantizedGraph) -> None:
    """Refuse what the HTP does not take or computes wrongly; see `htp_limits.py`."""
    nodes = {node.name: node for node in graph.program.graph.nodes}
    problems: dict[str, list[str]] = {}
    for mark in graph.marks:
        scheme = graph.encodings[mark.name].scheme
        problem = None
        if mark.kind is Kind.ADAPTER:
            problem = input_problem(scheme)
        elif mark.kind is Kind.BASE:
            is_table = any(operation(user) == "embedding" for user in nodes[mark.node].users)
            problem = table_problem(scheme) if is_table else weight_problem(scheme)
        if problem:
            problems.setdefault(problem, []).append(mark.name)
    problems |= _rescale_problems(graph)
    if problems:
        lines = [f"{listed(names, 3)}: {problem}" for problem, names in problems.items()]
        raise ExportError("Qualcomm's HTP does not take this base:\n  " + "\n  ".join(lines))


def _rescale_problems(graph: QuantizedGraph) -> dict[str, list[str]]:
    """Products whose result cannot be rescaled to its grid."""
    marks = {mark.node: mark for mark in graph.marks}
    found: dict[str, list[str]] = {}
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
                found.setdefault(why, []).append(names[2])
    return found


def _refuse_different_encodings(simulations: Mapping[str, Simulation]) -> None:
    (first, one), *others = simulations.items()
    known = one.encodings
    for name, other in others:
        own = other.encodings
        differing = [
            key
            for key in {**known, **own}
            if key not in known or not known[key].equals(own.get(key))
        ]
        if differing:
            raise ExportError(
                f"adapters {first} and {name} have {len(differing)} different encodings, "
                f"{differing[0]} first, and one graph serves all adapters. "
                "Set simulation.base_activations: none and calibrate again"
            )


def _write_graphs(
    graphs: Mapping[str, NpuGraph], base: Path, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write the QDQ graphs, which share a weight file.

    Returns:
        the adapter's codes by input name.
    """
    ir, codes, first = require("onnx_ir", "onnx"), dict[str, Any](), next(iter(graphs))
    for name, graph in graphs.items():
        model, codes = npu_onnx(graph.device, {**metadata, "qwlora.graph": name})
        if name == first:
            ir.save(model, base / f"{name}.onnx", external_data=WEIGHTS)
        else:
            share_weights(model, base / f"{first}.onnx")
            ir.save(model, base / f"{name}.onnx")
    return codes


def _codes(simulation: Simulation, name: str) -> Any:
    """The codes of an adapter's weight as the graph's input holds them: transposed, signed."""
    weight = name.removesuffix(CODES)
    encoding = simulation.encodings[weight]
    codes = encoding.quantize(simulation.adapter_weights[weight]).to(torch.int32)
    bits = encoding.scheme.bitwidth
    return (codes + encoding.scheme.symmetric_offset).T.numpy().astype(f"int{bits}")


def _padded(codes: Any, like: Any) -> Any:
    """`codes` in the shape of `like`, with zeros for the ranks that it has not."""
    padded = np.zeros_like(like)
    padded[tuple(slice(0, size) for size in codes.shape)] = codes
    return padded


def _write_adapter(bundle: Path, name: str, codes: Mapping[str, Any], scaling: float) -> None:
    (bundle / name).mkdir()
    tensors = {key: torch.from_numpy(array) for key, array in codes.items()}
    write_tensors(bundle / name / ADAPTER, {**tensors, ALPHA: torch.tensor([scaling])})
    record = {"adapter": name, "base": record_digest(bundle / BASE)}
    manifest.write(bundle / name, RECORD, record, [ADAPTER])
