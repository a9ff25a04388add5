"""The `aimet` target: a `.aimet` folder for AI Hub and aimet-onnx, and files for it.

    prefill.aimet/, decode.aimet/    of a causal language model: graphs with a key-value cache
    model.aimet/                     of any other model
      model.onnx                     float model with fixed shapes, weights on their grids
      model.data                     its weights, the same bytes in all folders
      model.encodings                AIMET encodings, 1.0.0 or 2.0.0
    golden/                          inputs, and the outputs that were computed of them
    submit_aihub.py                  compiles and runs it on AI Hub, and compares; needs an account
    README.md                        the commands
    graphs.json, GRAPH_host.onnx     of graphs with a cache, see `kv_cache_graphs.py`

AI Hub refuses a `.aimet` folder that holds anything else, so the others are next to it.
"""

from __future__ import annotations

import filecmp
from importlib import resources
from pathlib import Path

from qwlora.errors import VerificationError
from qwlora.export.npu.aimet_encodings import write_float_encodings
from qwlora.export.npu.float_onnx import FloatOnnx, float_graphs, to_float_onnx
from qwlora.export.npu.float_onnx_runner import FloatGraphs, FloatOnnxModel
from qwlora.export.npu.kv_cache_graphs import (
    GOLDEN,
    has_graphs,
    read_graphs,
    write_golden,
    write_graphs,
)
from qwlora.export.onnx.onnx_edits import save_graph
from qwlora.export.proof.contents import GOLDEN_FILES, SIMULATED_ADAPTER, Contents
from qwlora.export.target import Backend, ExportedGraph
from qwlora.formats.model_card import marked
from qwlora.graph.quantized_graph import Kind

MODEL_FILE, DATA_FILE, ENCODINGS_FILE = "model.onnx", "model.data", "model.encodings"
_FILES = {MODEL_FILE, DATA_FILE, ENCODINGS_FILE}
_SCRIPT = "submit_aihub.py"


class Aimet(Backend):
    """Float models with encodings; ONNX Runtime runs them with these as Q/DQ nodes."""

    contents = Contents(
        adapter=(
            "*.aimet/model.onnx",
            "*.aimet/model.data",
            "*.aimet/model.encodings",
            "*_host.onnx",
            "graphs.json",
            "submit_aihub.py",
            *GOLDEN_FILES,
            *SIMULATED_ADAPTER,
        ),
        scripts={"submit_aihub.py": "npu/aimet_templates/submit_aihub.py.template"},
    )

    def write_adapter(self, exported: ExportedGraph, base: Path, folder: Path) -> None:
        write_aimet(exported, folder)

    def open(self, folder: Path, case: str) -> FloatOnnxModel | FloatGraphs:
        return open_aimet(folder)


def write_aimet(exported: ExportedGraph, folder: Path) -> None:
    """Write a `.aimet` folder for each of `exported.graphs`, or one for a model without a cache,
    and the files next to them."""
    npus, inner = {}, {}
    for name in exported.graphs:
        ((_, float_onnx, npus[name]),) = float_graphs({"": exported}, name)
        inner[name] = float_onnx.inner
        _write_model(float_onnx, exported, folder / f"{name}.aimet")
    if npus:
        write_graphs(folder, npus, {n: {"model": f"{n}.aimet"} for n in npus}, {"float": inner})
        _opened_graphs(folder).write_golden(exported.sample["input_ids"])
    else:
        simulation, sample = exported.simulation, exported.sample
        inputs = simulation.bind(sample)
        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        float_onnx = to_float_onnx(simulation.graph(), shapes)
        float_onnx.model.metadata_props.update(exported.metadata)
        _write_model(float_onnx, exported, folder / "model.aimet")
        write_golden(folder / GOLDEN, inputs, simulation.outputs(sample))
    graph = float_onnx.graph
    widths = (
        graph.encodings[mark.name].scheme.bitwidth
        for mark in graph.marks
        if mark.kind is Kind.ACTIVATION
    )
    templates = resources.files("qwlora.export.npu") / "aimet_templates"
    script = (templates / f"{_SCRIPT}.template").read_text()
    full_type = "w8a16" if max(widths, default=16) > 8 else "int8"
    (folder / _SCRIPT).write_text(script.replace("@FULL_TYPE@", full_type))
    readme = templates / f"{'README.graphs' if npus else 'README'}.md.template"
    (folder / "README.md").write_text(marked(readme.read_text()))


def _write_model(float_onnx: FloatOnnx, exported: ExportedGraph, folder: Path) -> None:
    folder.mkdir(parents=True)
    # every weight external: a stored model of more than 2 GB is no protobuf file
    save_graph(float_onnx.model, folder / MODEL_FILE, DATA_FILE, smallest=64)
    write_float_encodings(float_onnx, folder / ENCODINGS_FILE, exported.encodings_version)


def open_aimet(folder: Path) -> FloatOnnxModel | FloatGraphs:
    """The files in ONNX Runtime, after every check that they allow.

    Raises:
        VerificationError: a `.aimet` folder lacks a file or holds another one, graphs have
            different weights, or see `problems` of what is returned.
    """
    graphs = read_graphs(folder)["graphs"].values() if has_graphs(folder) else ()
    names = [graph["model"] for graph in graphs] or ["model.aimet"]
    for model in (folder / name for name in names):
        present = {path.name for path in model.iterdir()} if model.is_dir() else set()
        if problems := [f"{name} is missing" for name in sorted(_FILES - present)] + [
            f"{name} does not belong there: AI Hub refuses the folder" for name in present - _FILES
        ]:
            raise VerificationError(f"{model} is not a complete .aimet folder", problems)
    first, *others = (f"{name}/{DATA_FILE}" for name in names)
    problems = [
        f"{other} differs from {first}, but all graphs must have the same weights"
        for other in others
        if not filecmp.cmp(folder / first, folder / other, shallow=False)
    ]
    opened = _opened_graphs(folder) if graphs else _opened(folder / names[0])
    if problems := problems or opened.problems():
        raise VerificationError(f"{folder}: the files contradict each other", problems)
    return opened


def _opened(model: Path) -> FloatOnnxModel:
    return FloatOnnxModel(model / MODEL_FILE, model / ENCODINGS_FILE)


def _opened_graphs(folder: Path) -> FloatGraphs:
    graphs = read_graphs(folder)["graphs"]
    return FloatGraphs(folder, {name: _opened(folder / graphs[name]["model"]) for name in graphs})
