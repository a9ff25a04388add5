"""What the `qairt` target writes: one base, and weights and encodings of every LoRA use case.

    model.onnx, model.data       float model with LoRA branches, weights on their grids; LoRA
                                 weights are zeros, so by itself it computes the base
    base.encodings               its encodings
    lora_weight_list.txt         names of the updatable initializers, one a line
    CASE.safetensors             LoRA weights of a use case, by name of the initializer
    CASE.encodings               encodings of the whole graph for it
    lora_config.yaml             LoRA v2: use cases on model.onnx, switched one at a time
    lora_adaptor_list.yaml       the same files by use case
    v3: base.onnx, base_v3.encodings, CASE.onnx, lora_config_v3.yaml
                                 N + 1 graphs: the base without LoRA, and one for each use case.
                                 Base weights are model.data and LoRA weights CASE.safetensors in
                                 all of them: nothing is stored twice
    golden/CASE/                 inputs and simulated outputs

With `export.graphs` in the recipe there is all of this for each graph, GRAPH_model.onnx,
GRAPH_CASE.encodings and so on; model.data, CASE.safetensors and lora_weight_list.txt are shared.
`float_graphs.py` lists the other files.

`none` is the zero adapter; in v3 it is base.onnx. Ranks are padded to the largest, the scale is
folded into lora_B (`use_cases.py`), so QAIRT's lora_alpha stays 1.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from qwlora.errors import ExportError
from qwlora.export.aimet_encodings import write_float_encodings
from qwlora.export.cached_graphs import read_graphs
from qwlora.export.float_graphs import (
    FloatGraphs,
    float_graphs,
    write_float_graphs,
    write_graph_golden,
)
from qwlora.export.float_onnx import FloatOnnx, carry, to_float_onnx
from qwlora.export.float_runtime import FloatOnnxModel
from qwlora.export.golden import write_golden
from qwlora.export.target import ExportedGraph, ExportedUseCases
from qwlora.export.use_cases import NONE
from qwlora.formats.card_mark import marked
from qwlora.graph.quantized_graph import Kind, QuantizedGraph
from qwlora.messages import listed
from qwlora.simulation.npu_graph import NpuGraph
from qwlora.system.optional_packages import require

MODEL_FILE, DATA_FILE, BASE_ENCODINGS = "model.onnx", "model.data", "base.encodings"
LIST_FILE, CONFIG_FILE, ADAPTORS_FILE = (
    "lora_weight_list.txt",
    "lora_config.yaml",
    "lora_adaptor_list.yaml",
)
V3_FILE, V3_ENCODINGS, V3_CONFIG_FILE = "base.onnx", "base_v3.encodings", "lora_config_v3.yaml"
_BASE = "base"
_Form = tuple[str, QuantizedGraph, FloatOnnx]  # of a use case
UPDATABLE = "qwlora.quant_updatable_mode"  # in the metadata of model.onnx


def write_qairt(exported: ExportedUseCases, folder: Path) -> None:
    """Write all files.

    Raises:
        ExportError: see `to_float_onnx`; a use case has another base; or a part of the adapter
            cannot be lifted out of the graph.
        MissingExtraError: the `onnx` extra is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases, readme = {_BASE: exported.base, **exported.cases}, "README.md"
    if exported.base.graphs:
        readme = "README.graphs.md"
        _write_cached(exported, cases, folder)
    else:
        whole = ((case, own.simulation.graph(), _whole(own)) for case, own in cases.items())
        _write_graph(exported, whole, folder, "")
        for case, own in exported.cases.items():
            write_golden(own, folder, case)
    template = resources.files("qwlora.export") / "qairt_templates" / f"{readme}.template"
    text = template.read_text().replace("@UPDATABLE@", exported.updatable)
    (folder / "README.md").write_text(marked(text))


def _whole(exported: ExportedGraph) -> FloatOnnx:
    made = to_float_onnx(exported.simulation.graph(), exported.simulation.bind(exported.sample))
    made.model.metadata_props.update(exported.metadata)
    return made


def _write_cached(
    exported: ExportedUseCases, cases: Mapping[str, ExportedGraph], folder: Path
) -> None:
    """Write graphs with a key-value cache."""
    adapted = next(case for case in exported.cases if case != NONE)
    described: dict[str, tuple[NpuGraph, list[str]]] = {}

    def forms(graph: str) -> Iterator[_Form]:
        for case, each in float_graphs(cases, graph, adapted):
            if case == _BASE:
                described[graph] = each.npu, each.inner
            yield case, each.npu.device, each.made

    for graph in exported.base.graphs:
        _write_graph(exported, forms(graph), folder, f"{graph}_")
    # each use case has grids of its own
    files = {graph: {"model": f"{graph}_{MODEL_FILE}", "encodings": {}} for graph in described}
    write_float_graphs(folder, described, files)
    for case, own in exported.cases.items():
        write_graph_golden(use_case_graphs(folder, case), own.sample["input_ids"], folder, case)


def use_case_graphs(folder: Path, case: str) -> FloatGraphs:
    """The graphs with a key-value cache of a use case; "base" is `BASE_ENCODINGS`, as stored."""
    return FloatGraphs(
        folder,
        {
            graph: use_case_model(folder, case, f"{graph}_")
            for graph in read_graphs(folder)["graphs"]
        },
    )


def use_case_model(folder: Path, case: str, prefix: str) -> FloatOnnxModel:
    """A use case of one graph; "base" has the weights of the model itself."""
    weights = None if case == _BASE else folder / f"{case}.safetensors"
    return FloatOnnxModel(
        folder / f"{prefix}{MODEL_FILE}", folder / f"{prefix}{case}.encodings", weights
    )


def _write_graph(
    exported: ExportedUseCases, forms: Iterator[_Form], folder: Path, prefix: str
) -> None:
    """Write the files of one graph.

    Args:
        forms: by case, the base first.
        prefix: of the names of its files.
    """
    version = exported.base.encodings_version
    _, base_graph, base = next(forms)
    names = [m.name for m in base_graph.marks if m.kind is Kind.ADAPTER]
    digests = _digests(base, names)
    base.model.metadata_props[UPDATABLE] = exported.updatable
    first = next((f"{graph}_" for graph in exported.base.graphs), "")
    _save(base.model, folder / f"{prefix}{MODEL_FILE}", folder / f"{first}{MODEL_FILE}")
    write_float_encodings(base_graph, base.encodings, folder / f"{prefix}{BASE_ENCODINGS}", version)
    (folder / LIST_FILE).write_text("".join(f"{name}\n" for name in names))
    encodings = base.encodings
    del base
    for case, graph, made in forms:
        if differing := sorted(
            name for name, d in _digests(made, names).items() if digests.get(name) != d
        ):
            raise ExportError(
                f"{case}: base tensors differ from the base's: {listed(differing, 3)}"
            )
        weights = {n: np.array(made.model.graph.initializers[n].const_value) for n in names}
        save_file(weights, folder / f"{case}.safetensors", {"format": "np"})
        write_float_encodings(graph, made.encodings, folder / f"{prefix}{case}.encodings", version)
        if case != NONE:
            _write_v3_case(folder, case, names, prefix)
    ir = require("onnx_ir", "onnx")
    model = ir.load(folder / f"{prefix}{MODEL_FILE}")
    alone = without_adapter(FloatOnnx(model, encodings), names)
    ir.save(alone.model, folder / f"{prefix}{V3_FILE}")  # its weights stay in model.data
    path = folder / f"{prefix}{V3_ENCODINGS}"
    write_float_encodings(base_graph, alone.encodings, path, version)
    _write_lists(folder, list(exported.cases), prefix)


def _save(model: Any, path: Path, first: Path) -> None:
    """Write a model, and model.data if it is the first; the others read that.

    Raises:
        ExportError: it has other weights.
    """
    ir = require("onnx_ir", "onnx")
    if path == first:
        ir.save(model, path, external_data=DATA_FILE, size_threshold_bytes=64)
        return
    for name, value in ir.load(first).graph.initializers.items():
        if not isinstance(value.const_value, ir.ExternalTensor):
            continue
        own = model.graph.initializers.get(name)
        if own is None or own.const_value.tobytes() != value.const_value.tobytes():
            raise ExportError(f"{path.name}: {name} differs from that of {first.name}")
        own.const_value = value.const_value
    ir.save(model, path)


def branch_values(graph: Any, names: Iterable[str]) -> tuple[set[Any], set[Any]]:
    """(values that the initializers `names` compute, sums of them and a value of the base)."""
    branch, sums = {graph.initializers[name] for name in names}, set[Any]()
    for node in graph:
        inside = [value for value in node.inputs if value in branch]
        if node.op_type == "Add" and len(inside) == 1:
            sums.update(node.outputs)
        elif inside:
            branch.update(node.outputs)
    return branch, sums


def without_adapter(made: FloatOnnx, names: Iterable[str]) -> FloatOnnx:
    """The model without the branches that read the initializers `names`, in place.

    A branch is what those weights compute, up to the Add that joins it to the base; readers of the
    sum then read the base's operand.

    Raises:
        ExportError: a branch does not end in such an Add.
    """
    ir = require("onnx_ir", "onnx")
    graph = made.model.graph
    branch, sums = branch_values(graph, names)
    for total in sums:
        (kept,) = (value for value in total.producer().inputs if value not in branch)
        ir.convenience.replace_all_uses_with(total, kept)
    if any(output in branch for output in graph.outputs):
        raise ExportError("an output of the model is computed by the adapter alone")
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(made.model)
    left = {o.name for node in graph for o in node.outputs} | set(graph.initializers)
    left |= {value.name for value in graph.inputs}
    kept_encodings = {n: e for n, e in made.encodings.items() if n in left and not e.carried}
    carry(made.model, kept_encodings)
    return FloatOnnx(made.model, kept_encodings)


def _digests(made: FloatOnnx, adapter: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every initializer of the base."""
    own = set(adapter)
    return {
        name: hashlib.sha256(value.const_value.tobytes()).hexdigest()
        for name, value in made.model.graph.initializers.items()
        if name not in own
    }


def _write_v3_case(folder: Path, case: str, names: Iterable[str], prefix: str) -> None:
    ir = require("onnx_ir", "onnx")
    model, file = ir.load(folder / f"{prefix}{MODEL_FILE}"), f"{case}.safetensors"
    places = safetensors_places(folder / file)
    for name in names:
        value, (start, length) = model.graph.initializers[name], places[name]
        value.const_value = ir.ExternalTensor(
            file, start, length, ir.DataType.FLOAT, shape=value.shape, name=name, base_dir=folder
        )
    ir.save(model, folder / f"{prefix}{case}.onnx")


def safetensors_places(path: Path) -> dict[str, tuple[int, int]]:
    """(first byte in the file, number of bytes) of each tensor."""
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return {
        name: (
            8 + size + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


def _write_lists(folder: Path, cases: list[str], prefix: str) -> None:
    def use_case(case: str, model: str, encodings: str) -> dict[str, str]:
        own = {} if model == V3_FILE else {"lora_weights": f"{case}.safetensors"}
        return {
            "name": case,
            "model_name": f"{prefix}{model}",
            **own,
            "quant_overrides": f"{prefix}{encodings}",
            "output_path": "./output",
        }

    v2 = [use_case(case, MODEL_FILE, f"{case}.encodings") for case in cases]
    v3 = [use_case(_BASE, V3_FILE, V3_ENCODINGS)] + [
        use_case(case, f"{case}.onnx", f"{case}.encodings") for case in cases if case != NONE
    ]
    adaptors = [
        {
            "name": case,
            "encodings_path": f"{prefix}{case}.encodings",
            "safetensor_path": f"{case}.safetensors",
        }
        for case in cases
    ]
    for name, content in (
        (CONFIG_FILE, {"use_case": v2}),
        (V3_CONFIG_FILE, {"use_case": v3}),
        (ADAPTORS_FILE, adaptors),
    ):
        (folder / f"{prefix}{name}").write_text(yaml.safe_dump(content, sort_keys=False))
