"""Targets `aimet` and `qairt`: float ONNX models and AIMET encodings.

`aimet` writes `.aimet` folders for AI Hub and aimet-onnx, and files for them:

    GRAPH.aimet/                     of a causal language model: graphs with a key-value cache
    model.aimet/                     of any other model
      model.onnx                     float model with fixed shapes, weights on their grids
      model.data                     its weights, the same bytes in all folders
      model.encodings                AIMET encodings, 1.0.0 or 2.0.0
    golden/                          inputs, and the outputs that were computed of them
    submit_aihub.py                  compiles and runs it on AI Hub, and compares; needs an account
    README.md                        the commands
    graphs.json, GRAPH_host.onnx     of graphs with a cache, see `kv_cache_graphs.py`

`qairt` writes one base, and weights and encodings of every LoRA use case, for the converter and
importer of Qualcomm's QAIRT:

    GRAPH_model.onnx, model.data    float model with LoRA branches, weights on their grids; LoRA
                                    weights are zeros, so by itself it computes the base
    GRAPH_base.encodings            its encodings
    lora_weight_list.txt            names of the updatable initializers, one per line
    CASE.safetensors                LoRA weights of a use case, by name of the initializer
    GRAPH_CASE.encodings            encodings of the whole graph for it
    GRAPH_lora_config.yaml          LoRA v2: use cases on one graph, switched one at a time
    GRAPH_lora_adaptor_list.yaml    the same files by use case
    golden/CASE/                    inputs, and the outputs that were computed of them

GRAPH is `forward`, with the sample's shapes, if the model is no causal language model. Graphs
with a key-value cache (`prompt_ar128_cl1024`, `token_ar1_cl1024`) share model.data,
CASE.safetensors and lora_weight_list.txt; `kv_cache_graphs.py` lists the files next to them.

`none` is the zero adapter. Ranks are padded to the largest, the scale is folded into lora_B
(`canonical_adapter.py`). The input lora_alpha, [adapters of the largest use case], has the strength
of each adapter of the use case, from 0 to 1; at 1, the graph computes what was simulated:

    h = lora_alpha[place] * lora_A(x)        place of each rank; h keeps the grid of lora_A(x)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save_file

from qwlora.errors import ExportError, VerificationError, foreign_as, listed
from qwlora.formats.model_card import marked
from qwlora.graph.quantized_graph import Kind
from qwlora.grid.encoding import Encoding, encoding_from_range
from qwlora.grid.scheme import Scheme
from qwlora.simulation.adapter_simulations import BaseActivations
from qwlora.system.optional_packages import require
from qwlora.system.parameter_names import BASE, is_first_factor
from qwlora.targets.npu import genie
from qwlora.targets.npu.device_graph import ALPHA
from qwlora.targets.npu.float_onnx import FloatOnnx, FloatOnnxModel, float_graphs, to_float_onnx
from qwlora.targets.npu.kv_cache_graphs import (
    GOLDEN,
    CachedGraphs,
    graph_sizes,
    has_graphs,
    read_graphs,
    share_weights,
    write_golden,
    write_graphs,
)
from qwlora.targets.npu.npu_graph import NpuGraph
from qwlora.targets.onnx.onnx_model import constant, new_node, numbers, save_graph
from qwlora.targets.onnx.onnx_runtime import EMBEDDINGS_FILE, write_embeddings
from qwlora.targets.proof.contents import GOLDEN_FILES, SIMULATED_ADAPTER, TOKENIZER, Contents
from qwlora.targets.target import Backend, ExportedGraph, members

MODEL_FILE, DATA_FILE, ENCODINGS_FILE = "model.onnx", "model.data", "model.encodings"


class Aimet(Backend):
    """Float models with encodings; ONNX Runtime runs them with these as Q/DQ nodes."""

    contents = Contents(
        adapter=(
            *(f"*.aimet/{name}" for name in (MODEL_FILE, DATA_FILE, ENCODINGS_FILE)),
            "*_host.onnx",
            "graphs.json",
            EMBEDDINGS_FILE,
            "submit_aihub.py",
            *GOLDEN_FILES,
            *SIMULATED_ADAPTER,
            *TOKENIZER,
        ),
        scripts={"submit_aihub.py": "npu/aimet_templates/submit_aihub.py.template"},
    )

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        """Write a `.aimet` folder for each graph, or one for a model without a cache."""
        # AI Hub refuses a `.aimet` folder that holds anything else, so other files are next to it.
        npus, names = {}, graph_sizes(exported)  # which refuses a missing sample
        for name in names if exported.graphs else ():
            ((_, float_onnx, npus[name]),) = float_graphs({"": exported}, name)
            _write_model(float_onnx, exported, folder / f"{name}.aimet")
        if npus:
            write_graphs(folder, npus, {name: {"model": f"{name}.aimet"} for name in npus})
            write_embeddings(exported.simulation, folder)
            CachedGraphs(folder, _aimet_models(folder)).write_golden(exported.sample)
        else:
            simulation, sample = exported.simulation, exported.sample
            inputs = simulation.bind(sample)
            shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
            float_onnx = to_float_onnx(simulation.graph(), shapes, exported.opset)
            float_onnx.model.metadata_props.update(exported.metadata)
            _write_model(float_onnx, exported, folder / "model.aimet")
            write_golden(folder / GOLDEN, inputs, simulation.outputs(sample))
        templates = resources.files("qwlora.targets.npu") / "aimet_templates"
        script = (templates / "submit_aihub.py.template").read_text()
        widest = max(float_onnx.graph.activation_bitwidths, default=16)
        full_type = "w8a16" if widest > 8 else "int8"
        (folder / "submit_aihub.py").write_text(script.replace("@FULL_TYPE@", full_type))
        readme = templates / f"{'README.graphs' if npus else 'README'}.md.template"
        (folder / "README.md").write_text(marked(readme.read_text()))

    def open(self, folder: Path, case: str) -> FloatOnnxModel | CachedGraphs:
        models = checked(folder, _aimet_models(folder))
        return CachedGraphs(folder, models) if has_graphs(folder) else models["model"]


def _aimet_models(folder: Path) -> dict[str, FloatOnnxModel]:
    graphs = read_graphs(folder)["graphs"] if has_graphs(folder) else {}
    folders = {name: folder / graph["model"] for name, graph in graphs.items()}
    folders = folders or {"model": folder / "model.aimet"}
    return {n: FloatOnnxModel(f / MODEL_FILE, f / ENCODINGS_FILE) for n, f in folders.items()}


def _write_model(float_onnx: FloatOnnx, exported: ExportedGraph, folder: Path) -> None:
    folder.mkdir(parents=True)
    _save(float_onnx.model, folder / MODEL_FILE, DATA_FILE, exported.opset)
    float_onnx.write_encodings(folder / ENCODINGS_FILE, exported.encodings_version)


def _save(model: Any, path: Path, data: str | None, opset: int | None) -> None:
    # Every weight of 64 bytes or more is external, since protobuf holds at most 2 GB.
    save_graph(model, path, data, smallest=64)
    if opset is not None:
        problem = f"{path.name} has an operator that opset {opset} of ONNX lacks"
        with foreign_as(ExportError, problem, "choose a higher opset"):
            require("onnx", "onnx").checker.check_model(str(path))


class Qairt(Backend):
    """Float models with encodings and LoRA files for each use case; ONNX Runtime runs them with
    these as Q/DQ nodes."""

    contents = Contents(
        adapter=(
            "*model.onnx",
            "*_host.onnx",
            "model.data",
            "*.encodings",
            "*.safetensors",
            "*.yaml",
            "*lora_weight_list.txt",
            "graphs.json",
            EMBEDDINGS_FILE,
            *GOLDEN_FILES,
            *genie.FORMS,
            *TOKENIZER,
        ),
        forms=genie.FORMS,
    )

    def write_cases(
        self, base: ExportedGraph, cases: Mapping[str, ExportedGraph], folder: Path
    ) -> None:
        count, graphs = max(len(members(case)) for case in cases), graph_sizes(base)
        folder.mkdir(parents=True, exist_ok=True)
        npus = {graph: _write_graph(base, cases, graph, folder, count) for graph in graphs}
        # no grids in graphs.json: each use case has its own
        files = {graph: {"model": f"{graph}_model.onnx", "encodings": {}} for graph in npus}
        write_graphs(folder, npus, files, {"use_cases": list(cases), "layout": base.layout})
        write_embeddings(base.simulation, folder)
        for case, exported in cases.items():
            models = _use_case_models(folder, case)
            simulation, sample = exported.simulation, exported.sample
            sample = sample if exported.graphs else simulation.bind(sample)
            CachedGraphs(folder, models).write_golden(sample, case)
        for name, content in _lists(models, cases).items():
            (folder / name).write_bytes(content)
        template = resources.files("qwlora.targets.npu") / "qairt_templates/README.md.template"
        text = template.read_text().replace("@UPDATABLE@", base.updatable)
        if base.layout:
            genie.write_files(folder, next(iter(npus.values())), base, genie.sections(cases))
            text += genie.QAIRT_README.read_text()
        (folder / "README.md").write_text(marked(text))

    def own_files(self, folder: Path, case: str) -> list[Path]:
        encodings = [f"{graph}_{case}.encodings" for graph in read_graphs(folder)["graphs"]]
        return [folder / name for name in (f"{case}.safetensors", *encodings)]

    def open(self, folder: Path, case: str) -> CachedGraphs:
        models = checked(folder, _use_case_models(folder, case))
        cases = read_graphs(folder).get("use_cases")
        lists = _lists(models, cases if isinstance(cases, list) else ())
        present = {name: folder / name for name in lists if (folder / name).is_file()}
        if changed := [n for n in lists if n not in present or present[n].read_bytes() != lists[n]]:
            problems = [f"{name} does not list what is in the folder" for name in changed]
            raise VerificationError(f"{folder}: the files contradict each other", problems)
        return CachedGraphs(folder, models)


def _use_case_models(folder: Path, case: str) -> dict[str, FloatOnnxModel]:
    return {
        graph: FloatOnnxModel(
            folder / f"{graph}_model.onnx",
            folder / f"{graph}_{case}.encodings",
            folder / f"{case}.safetensors",
        )
        for graph in read_graphs(folder)["graphs"]
    }


def _write_graph(
    base: ExportedGraph, cases: Mapping[str, ExportedGraph], graph: str, folder: Path, count: int
) -> NpuGraph:
    """Write the files of one graph; returns it with the zero adapter. `count` is the number of
    adapters of the largest use case."""
    file, first = (folder / f"{name}_model.onnx" for name in (graph, next(iter(graph_sizes(base)))))
    names, fixed = list[str](), dict[str, Encoding]()
    for case, float_onnx, npu in float_graphs({BASE: base, **cases}, graph):
        if base.layout and case == BASE and file == first:
            genie.refuse_other_positions(npu, base)
        _add_alpha_(float_onnx, count)
        float_onnx.write_encodings(folder / f"{graph}_{case}.encodings", base.encodings_version)
        # QAIRT's importer updates the LoRA weights, and the encodings that quant_updatable_mode
        # says: nothing else of a use case may differ from the base.
        model, stored = float_onnx.model, first if case == BASE else file
        differing = set(share_weights(model, stored) if stored.exists() else ()) - {*names}
        differing |= {n for n, e in fixed.items() if not e.equals(float_onnx.encodings.get(n))}
        if differing:
            raise ExportError(
                f"{listed(sorted(differing), 3)} of {graph}_{case} differ from {stored.name}, and "
                f"use cases may differ in the adapter alone (base_activations: {base.updatable})"
            )
        if case == BASE:
            names = [mark.name for mark in float_onnx.graph.marks if mark.kind is Kind.ADAPTER]
            interface = npu.device.interface
            if any(map(is_first_factor, names)):
                shapes, inputs = {**interface.shapes, ALPHA: (count,)}, (*interface.inputs, ALPHA)
                interface = replace(interface, inputs=inputs, shapes=shapes)
            of_base = replace(npu, device=replace(npu.device, interface=interface))
            fixed = _fixed(float_onnx, names, base.updatable)
            model.metadata_props["qwlora.quant_updatable_mode"] = base.updatable
            _save(model, file, DATA_FILE if file == first else None, base.opset)
        else:
            weights = {name: numbers(model.graph.initializers[name]) for name in names}
            save_file(weights, folder / f"{case}.safetensors", {"format": "np"})
    return of_base


def _add_alpha_(float_onnx: FloatOnnx, count: int) -> None:
    """Multiply what each lora_A computes by its adapter's strength, one of `count` in an input."""
    ir, model, encodings = require("onnx_ir", "onnx"), float_onnx.model, float_onnx.encodings
    floats = ir.TensorType(ir.DataType.FLOAT)
    strength = alpha = ir.val(ALPHA, shape=ir.Shape([count]), type=floats)
    factors = [mark.name for mark in float_onnx.graph.marks if is_first_factor(mark.name)]
    if not factors:
        return
    model.graph.inputs.append(alpha)
    if not float_onnx.graph.has_float_activations:
        grid = Scheme(16, symmetric=False)
        encodings[ALPHA] = encoding_from_range(torch.tensor(0.0), torch.tensor(1.0), grid)
    if count > 1:
        rank = model.graph.initializers[factors[0]].shape[-1]
        adapters = constant(model, f"{ALPHA}.places", np.arange(rank) // (rank // count))
        gather = new_node("Gather", [alpha, adapters], f"{ALPHA}.gather")
        # `FloatOnnxModel` calls the rounding of a tensor by the tensor's name, so the node that
        # computes it needs another one.
        gather.name = f"{ALPHA}.by_rank"
        model.graph.insert_before(model.graph[0], gather)
        (strength,) = gather.outputs
        strength.shape, strength.type = ir.Shape([rank]), floats
        if ALPHA in encodings:
            encodings[strength.name] = encodings[ALPHA]
    for node in (n for name in factors for n in model.graph.initializers[name].consumers()):
        (value,) = node.outputs
        product = new_node("Mul", [value, strength], f"{value.name}.{ALPHA}")
        product.name, (scaled,) = f"{product.name}.mul", product.outputs
        scaled.shape, scaled.type = value.shape, value.type
        for user, index in list(value.uses()):
            if user is not product:
                user.replace_input_with(index, scaled)
        model.graph.insert_after(node, product)
        if value.name in encodings:
            encodings[scaled.name] = encodings[value.name]


def _fixed(float_onnx: FloatOnnx, names: list[str], mode: BaseActivations) -> dict[str, Encoding]:
    """The encodings of the base that no use case changes; `names` are those of LoRA weights."""
    initializers, encodings = float_onnx.model.graph.initializers, float_onnx.encodings
    changing = set[str]()
    if mode == "all":
        changing = encodings.keys() - initializers.keys() | {*names}
    elif mode == "adapter_only":
        # what LoRA weights compute, up to the sum with the base, whose grid all use cases share
        branch = {initializers[name] for name in names}
        for node in float_onnx.model.graph:
            inside = [value for value in node.inputs if value in branch]
            if inside and not (node.op_type == "Add" and len(inside) == 1):
                branch.update(node.outputs)
        changing = {value.name for value in branch}
    return {name: encoding for name, encoding in encodings.items() if name not in changing}


def _lists(models: Mapping[str, FloatOnnxModel], cases: Iterable[str]) -> dict[str, bytes]:
    """The files of lists by name: use cases of each graph, and weights that they update."""
    lists, weights = dict[str, Any](), next(iter(models.values())).replaced
    for graph in models:
        use_cases, adaptors = [], []
        for case in cases:
            tensors, encodings = f"{case}.safetensors", f"{graph}_{case}.encodings"
            use_case = {"name": case, "model_name": f"{graph}_model.onnx", "lora_weights": tensors}
            output = f"./output/{graph}/{case}"
            use_cases.append({**use_case, "quant_overrides": encodings, "output_path": output})
            adaptors.append({"name": case, "encodings_path": encodings, "safetensor_path": tensors})
        lists[f"{graph}_lora_config.yaml"] = {"use_case": use_cases}
        lists[f"{graph}_lora_adaptor_list.yaml"] = adaptors
    texts = {name: yaml.safe_dump(content, sort_keys=False) for name, content in lists.items()}
    texts["lora_weight_list.txt"] = "".join(f"{name}\n" for name in sorted(weights))
    return {name: text.encode() for name, text in texts.items()}


def checked(folder: Path, models: Mapping[str, FloatOnnxModel]) -> Mapping[str, FloatOnnxModel]:
    """The models in a folder; a VerificationError lists what contradicts their encodings."""
    if problems := [problem for model in models.values() for problem in model.problems()]:
        raise VerificationError(f"{folder}: the files contradict each other", problems)
    return models
