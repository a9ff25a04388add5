"""What the `qairt` target writes: one base, and weights and encodings of every LoRA use case.

    GRAPH_model.onnx, model.data    float model with LoRA branches, weights on their grids; LoRA
                                    weights are zeros, so by itself it computes the base
    GRAPH_base.encodings            its encodings
    lora_weight_list.txt            names of the updatable initializers, one a line
    CASE.safetensors                LoRA weights of a use case, by name of the initializer
    GRAPH_CASE.encodings            encodings of the whole graph for it
    GRAPH_lora_config.yaml          LoRA v2: use cases on one graph, switched one at a time
    GRAPH_lora_adaptor_list.yaml    the same files by use case
    golden/CASE/                    inputs, and the outputs that were computed of them

A causal language model has a graph `prefill` and a graph `decode` with a key-value cache, which
share model.data, CASE.safetensors and lora_weight_list.txt; `float_graphs.py` lists the files next
to them. Any other model has one graph without a name: model.onnx, base.encodings and so on.

`none` is the zero adapter. Ranks are padded to the largest, the scale is folded into lora_B
(`use_cases.py`), so QAIRT's lora_alpha stays 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from qwlora.errors import ExportError
from qwlora.export.npu.aimet_encodings import write_float_encodings
from qwlora.export.npu.float_graphs import (
    FloatGraph,
    FloatGraphs,
    float_graphs,
    write_float_graphs,
    write_graph_golden,
)
from qwlora.export.npu.float_onnx_runner import FloatOnnxModel
from qwlora.export.npu.golden import write_golden
from qwlora.export.npu.kv_cache_graphs import has_graphs, read_graphs
from qwlora.export.target import ExportedUseCases
from qwlora.formats.card_mark import marked
from qwlora.graph.quantized_graph import Kind
from qwlora.messages import listed
from qwlora.simulation.npu_graph import NpuGraph
from qwlora.system.optional_packages import require

MODEL_FILE, DATA_FILE, BASE_ENCODINGS = "model.onnx", "model.data", "base.encodings"
LIST_FILE, CONFIG_FILE, ADAPTORS_FILE = (
    "lora_weight_list.txt",
    "lora_config.yaml",
    "lora_adaptor_list.yaml",
)
_BASE = "base"
UPDATABLE = "qwlora.quant_updatable_mode"  # in the metadata of model.onnx


def write_qairt(exported: ExportedUseCases, folder: Path) -> None:
    """Write all files.

    Raises:
        ExportError: see `float_graphs`; or a use case has another base.
        MissingExtraError: the `onnx` extra is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described: dict[str, tuple[NpuGraph, list[str]]] = {}
    for name in exported.base.graphs or [""]:
        base = _write_graph(exported, name, folder)
        if base.npu is not None:
            described[name] = base.npu, base.inner
    if described:  # each use case has grids of its own
        files = {n: {"model": f"{n}_{MODEL_FILE}", "encodings": {}} for n in described}
        write_float_graphs(folder, described, files)
    for case, own in exported.cases.items():
        if described:
            ids = own.sample["input_ids"]
            write_graph_golden(use_case_graphs(folder, case), ids, folder, case)
        else:
            write_golden(own, folder, case)
    readme = "README.graphs.md" if described else "README.md"
    template = resources.files("qwlora.export.npu") / "qairt_templates" / f"{readme}.template"
    text = template.read_text().replace("@UPDATABLE@", exported.updatable)
    (folder / "README.md").write_text(marked(text))


def prefixes(folder: Path) -> list[str]:
    """Of the names of the files of each graph."""
    return [f"{graph}_" for graph in read_graphs(folder)["graphs"]] if has_graphs(folder) else [""]


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


def _write_graph(exported: ExportedUseCases, name: str, folder: Path) -> FloatGraph:
    """Write the files of one graph, and return it with the zero adapter."""
    prefix, version = f"{name}_" if name else "", exported.base.encodings_version
    cases = {_BASE: exported.base, **exported.cases}
    forms = float_graphs(cases, name)
    _, base = next(forms)
    names = [m.name for m in base.graph.marks if m.kind is Kind.ADAPTER]
    digests = _digests(base, names)
    base.made.model.metadata_props[UPDATABLE] = exported.updatable
    first = next((f"{graph}_" for graph in exported.base.graphs), "")
    _save(base.made.model, folder / f"{prefix}{MODEL_FILE}", folder / f"{first}{MODEL_FILE}")
    path = folder / f"{prefix}{BASE_ENCODINGS}"
    write_float_encodings(base.graph, base.made.encodings, path, version)
    (folder / LIST_FILE).write_text("".join(f"{name}\n" for name in names))
    for case, form in forms:
        found = _digests(form, names)
        if differing := sorted(name for name in found if digests.get(name) != found[name]):
            raise ExportError(
                f"{case}: base tensors differ from the base's: {listed(differing, 3)}"
            )
        known = form.made.model.graph.initializers
        weights = {name: np.array(known[name].const_value) for name in names}
        save_file(weights, folder / f"{case}.safetensors", {"format": "np"})
        path = folder / f"{prefix}{case}.encodings"
        write_float_encodings(form.graph, form.made.encodings, path, version)
    for file, content in use_case_lists(list(exported.cases), prefix).items():
        (folder / file).write_text(yaml.safe_dump(content, sort_keys=False))
    return base


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


def branch_values(graph: Any, names: Iterable[str]) -> set[str]:
    """Names of the LoRA branches: the initializers `names` and what they compute, without the sums
    with a value of the base."""
    branch = {graph.initializers[name] for name in names}
    for node in graph:
        inside = [value for value in node.inputs if value in branch]
        if inside and not (node.op_type == "Add" and len(inside) == 1):
            branch.update(node.outputs)
    return {value.name for value in branch}


def _digests(form: FloatGraph, adapter: Iterable[str]) -> dict[str, str]:
    """SHA-256 of every initializer of the base."""
    own = set(adapter)
    return {
        name: hashlib.sha256(value.const_value.tobytes()).hexdigest()
        for name, value in form.made.model.graph.initializers.items()
        if name not in own
    }


def use_case_lists(cases: list[str], prefix: str) -> Mapping[str, Any]:
    """What the YAML files of a graph hold, by name of the file."""
    use_cases = [
        {
            "name": case,
            "model_name": f"{prefix}{MODEL_FILE}",
            "lora_weights": f"{case}.safetensors",
            "quant_overrides": f"{prefix}{case}.encodings",
            "output_path": "./output",
        }
        for case in cases
    ]
    adaptors = [
        {
            "name": case,
            "encodings_path": f"{prefix}{case}.encodings",
            "safetensor_path": f"{case}.safetensors",
        }
        for case in cases
    ]
    return {
        f"{prefix}{CONFIG_FILE}": {"use_case": use_cases},
        f"{prefix}{ADAPTORS_FILE}": adaptors,
    }
